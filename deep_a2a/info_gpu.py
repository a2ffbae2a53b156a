"""What `deep-a2a info` finds out about GPUs: from the driver itself, which needs neither torch nor a native module."""

from __future__ import annotations

import ctypes
from importlib import import_module
from itertools import combinations

from deep_a2a.info_answer import Answer

_OLDEST_CAPABILITY = (9, 0)  # Hopper
# As the driver numbers them.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_MOST_PAIRS = 4  # that are named


class Driver:
    """The CUDA driver, as far as it is asked here. OSError where there is none."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self.status: int = self._library.cuInit(0)

    def device_count(self) -> int:
        return 0 if self.status else self._read("cuDeviceGetCount")

    def name(self, device: int) -> str:
        text = ctypes.create_string_buffer(128)
        self._library.cuDeviceGetName(text, len(text), device)
        return text.value.decode(errors="replace")

    def capability(self, device: int) -> tuple[int, int]:
        major = self._read("cuDeviceGetAttribute", _CAPABILITY_MAJOR, device)
        return major, self._read("cuDeviceGetAttribute", _CAPABILITY_MINOR, device)

    def can_access_peer(self, device: int, peer: int) -> bool:
        return self._read("cuDeviceCanAccessPeer", device, peer) != 0

    def _read(self, function: str, *arguments: int) -> int:
        value = ctypes.c_int(0)
        self.status = self.status or getattr(self._library, function)(ctypes.byref(value), *arguments)
        return value.value


def gpu() -> Answer:
    try:
        driver = Driver()
    except OSError:
        return Answer(False, "no NVIDIA driver (libcuda.so.1)", "run on a machine with an NVIDIA GPU and its driver")
    count = driver.device_count()
    if count == 0:
        status = f"(status {driver.status})"
        return Answer(False, f"the driver offers no GPU {status}", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    major, minor = driver.capability(0)
    return Answer(True, f"{count} x {driver.name(0)}, compute capability {major}.{minor}")


def cuda_backend() -> Answer:
    instead = 'backend="cpu" runs the same protocol'
    problem = _import_problem("deep_a2a._cuda")
    if problem is not None:
        remedy = "install the CUDA toolkit (12.0 or later), then pip install . in the source tree"
        return Answer(False, f"{problem}; {instead}", remedy)
    found = gpu()
    if not found.available:
        return Answer(False, f"built, but {found.detail}; {instead}", found.remedy)
    driver = Driver()
    old = [device for device in range(driver.device_count()) if driver.capability(device) < _OLDEST_CAPABILITY]
    if old:
        return Answer(False, f"GPUs {old} are older than Hopper; {instead}", "select others in CUDA_VISIBLE_DEVICES")
    return Answer(True, f"ranks have GPUs of this host ({found.detail}); several may share one")


def emulated_backend() -> Answer:
    problem = _import_problem("deep_a2a._emulated")
    if problem is not None:
        return Answer(False, problem, "pip install . in the source tree, with a C++17 compiler")
    return Answer(True, "the kernels of the cuda backend on the CPU, slowly: for tests")


def nvlink() -> Answer:
    """Peer access, which is what the cuda backend needs; NVLink is the fast way to it."""
    backend = cuda_backend()
    if not backend.available:
        return Answer(False, "between GPUs of a host; needs the cuda backend")
    driver = Driver()
    count = driver.device_count()
    apart = [pair for pair in combinations(range(count), 2) if not driver.can_access_peer(*pair)]
    if apart:
        more = "" if len(apart) <= _MOST_PAIRS else f" and {len(apart) - _MOST_PAIRS} more"
        pairs = ", ".join(f"{device} and {peer}" for device, peer in apart[:_MOST_PAIRS])
        return Answer(False, f"no peer access between GPUs {pairs}{more}", "select GPUs that NVLink connects")
    return Answer(True, f"all {count} GPUs have peer access" if count > 1 else "one GPU, which all ranks share")


def _import_problem(module: str) -> str | None:
    try:
        import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        return "the native module was not built" if missing else f"the native module does not load: {error}"
    return None
