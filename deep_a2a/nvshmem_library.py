"""Which NVSHMEM library this process uses, whether it fits, and ``_nvshmem``, which is linked against it.

The host library comes from the wheel nvidia-nvshmem-cu12 or -cu13, and is loaded by its path before ``_nvshmem`` is
imported, which names it without one. Where somebody has loaded one already (torch does), that one is taken: two in a
process would be two jobs.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

from deep_a2a.nvshmem_environment import is_set

Version = tuple[int, int, int]

SONAME = "libnvshmem_host.so.3"
_WHEELS = {12: "nvidia-nvshmem-cu12", 13: "nvidia-nvshmem-cu13"}
# With these a kernel fills in what the NIC reads: device code and library have to agree about it.
_DIRECT = ("NVSHMEM_IB_ENABLE_IBGDA", "NVSHMEM_GPUNETIO_ENABLE_GDAKI")


class LibraryError(ImportError):
    """What is in the way of several nodes, and how to get it out of the way."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}: {remedy}")
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True)
class Library:
    """A host library, open. ``loaded_before``: by somebody else."""

    path: Path
    version: Version
    loaded_before: bool


def find_library(cuda_major: int) -> Path:
    """Where the library for this version of CUDA is. Raises LibraryError."""
    loaded = mapped_library()
    return loaded if loaded is not None else _installed(cuda_major)


def mapped_library() -> Path | None:
    """The one that this process has loaded, if any."""
    for path in mapped_files():
        if path.name == SONAME:
            return path
    return None


def mapped_files() -> list[Path]:
    """Files that this process has mapped, libraries among them."""
    found: dict[Path, None] = {}
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                found[Path(fields[5])] = None
    return list(found)


def open_library(path: Path, loaded_before: bool) -> Library:
    """Loads it, which initializes nothing, and asks for its version. Raises LibraryError."""
    try:
        library = ctypes.CDLL(str(path))
        numbers = [ctypes.c_int(0) for _ in range(3)]
        library.nvshmemx_vendor_get_version_info(*map(ctypes.byref, numbers))
    except (OSError, AttributeError) as error:
        wheel = wheel_of(path) or "nvidia-nvshmem-cu12 or -cu13"
        raise LibraryError(f"{path} does not load as NVSHMEM 3 ({error})", f"install {wheel} anew") from error
    major, minor, patch = (number.value for number in numbers)
    return Library(path, (major, minor, patch), loaded_before)


def check_version(compiled: Version, library: Library, direct: bool) -> None:
    """Raises LibraryError unless device code of version `compiled` may run with the library."""
    wanted = f"{compiled[0]}.{compiled[1]}.*"
    if library.version[0] != compiled[0] or library.version < compiled:
        problem = f"NVSHMEM {dotted(compiled)} or a later {compiled[0]}.x, since it was compiled with that"
    elif direct and library.version[1] != compiled[1]:
        problem = f"NVSHMEM {wanted}, as kernels are to drive the NIC ({' or '.join(_DIRECT)})"
    else:
        return
    owner = ", which was loaded before deep_a2a came to it" if library.loaded_before else ""
    raise LibraryError(
        f"deep_a2a needs {problem}; {library.path}{owner} is {dotted(library.version)}",
        f"pip install '{wheel_of(library.path) or 'nvidia-nvshmem-cu13'}=={wanted}', or build deep_a2a with the other",
    )


def is_direct() -> bool:
    """Whether the environment asks for a transport that kernels drive by themselves."""
    return any(is_set(name) for name in _DIRECT)


def load() -> tuple[ModuleType, Library]:
    """``_nvshmem`` and the library under it. Raises LibraryError."""
    try:
        cuda = import_module("deep_a2a._cuda")
    except ImportError as error:
        raise LibraryError(
            f"several nodes need the CUDA backend, which does not load ({error})", "'deep-a2a info' says more about it"
        ) from error
    loaded_before = mapped_library() is not None
    library = open_library(find_library(cuda.cuda_major), loaded_before)
    try:
        native = import_module("deep_a2a._nvshmem")
    except ImportError as error:
        raise LibraryError(
            f"several nodes need the module _nvshmem, which does not load ({error})",
            "pip install . in the source tree, with nvcc, and with DEEP_A2A_NVSHMEM=ON to see what is missing",
        ) from error
    check_version(native.compiled_version(), library, is_direct())
    return native, library


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def wheel_of(path: Path) -> str | None:
    """The wheel that has brought this file: of several, the one that says it has this size."""
    size = path.stat().st_size if path.exists() else None
    for name in _WHEELS.values():
        entry = _entry(name)
        if entry is not None and entry[0] == path and entry[1] in (None, size):
            return name
    return None


def _installed(cuda_major: int) -> Path:
    wheel = _WHEELS.get(cuda_major, f"nvidia-nvshmem-cu{cuda_major}")
    remedy = f"pip install '{wheel}>=3.4.5,<4'"
    entry = _entry(wheel)
    if entry is None:
        others = [name for name in _WHEELS.values() if name != wheel and _entry(name) is not None]
        if others:
            raise LibraryError(
                f"deep_a2a was built with CUDA {cuda_major}, but NVSHMEM is here for another one ({others[0]})",
                f"pip uninstall {others[0]}, then {remedy}",
            )
        raise LibraryError("several nodes need NVSHMEM, which is not installed", remedy)
    path = entry[0]
    if not path.exists():
        raise LibraryError(f"{wheel} is installed, but {path} is gone", f"{remedy} --force-reinstall")
    if wheel_of(path) != wheel:
        raise LibraryError(
            f"{path} is not the one of {wheel}: wheels for another CUDA use the same path",
            f"uninstall those, then {remedy} --force-reinstall",
        )
    return path


def _entry(wheel: str) -> tuple[Path, int | None] | None:
    """The library that a wheel brings, and its size."""
    try:
        files = metadata.distribution(wheel).files or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == SONAME:
            return Path(os.path.realpath(file.locate())), file.size
    return None
