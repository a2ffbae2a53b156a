"""`deep-a2a info`: what is available here and, for what is not, how to get it.

No probe may make the command fail: what a probe cannot find out becomes part of its answer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from deep_a2a.benchmark.machine import cpu_model, memory_bytes, num_usable_cores, package_version
from deep_a2a.info_answer import Answer as Answer
from deep_a2a.info_gpu import cuda_backend, emulated_backend, gpu, nvlink
from deep_a2a.info_nvshmem import nics, nvshmem_module, remote_transports

_NVCC_TIMEOUT_S = 10
_NVSHMEM_PACKAGES = {"cu13": "nvidia-nvshmem-cu13", "cu12": "nvidia-nvshmem-cu12"}
_CUPY_PACKAGES = {"cu13": "cupy-cuda13x", "cu12": "cupy-cuda12x", "other": "cupy"}
_MIN_FILES = 256


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    section: str
    name: str
    answer: Answer


def main(argv: Sequence[str] | None = None, prog: str = "deep-a2a info") -> int:
    """Prints the report, as text, or with --json as a list of objects; returns 0, or 1 if its reader went away."""
    parser = argparse.ArgumentParser(prog=prog, description="What is available here, and how to get what is not.")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    as_json = parser.parse_args(argv).json
    findings = collect()
    try:
        print(json.dumps([to_json(each) for each in findings], indent=2) if as_json else format_report(findings))
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left goes nowhere, or the interpreter would fail to write it when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def collect() -> list[Finding]:
    """All findings, in the order of the report."""
    return [Finding(section, name, _guarded(probe)) for section, name, probe in _PROBES]


def to_json(finding: Finding) -> dict[str, object]:
    """section, name, available, detail, remedy."""
    return {"section": finding.section, "name": finding.name, **asdict(finding.answer)}


def format_report(findings: Sequence[Finding]) -> str:
    """A line for each finding, under the name of its section; below what is missing, how to get it."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    section = None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        answer = finding.answer
        lines.append(f"  {finding.name:<{width}}  {'yes' if answer.available else 'no':<3}  {answer.detail}".rstrip())
        if answer.remedy is not None:
            lines.append(f"  {'':<{width}}       to get it: {answer.remedy}")
    return "\n".join(lines)


def _guarded(probe: Callable[[], Answer]) -> Answer:
    try:
        return probe()
    except Exception as error:
        return Answer(False, f"could not find out: {type(error).__name__}: {error}")


def _package(name: str, remedy: str) -> Callable[[], Answer]:
    def probe() -> Answer:
        version = package_version(name)
        return Answer(False, "not installed", remedy) if version is None else Answer(True, version)

    return probe


def _package_of_cuda(packages: dict[str, str]) -> Answer:
    """Packages that come once for each version of CUDA, by the extra that installs them."""
    found = {name: package_version(name) for name in packages.values()}
    installed = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
    if installed:
        return Answer(True, installed)
    return Answer(False, "not installed", "pip install 'deep-a2a[cu13]', or [cu12] for CUDA 12")


def _python() -> Answer:
    return Answer(True, f"{platform.python_version()} ({platform.python_implementation()})")


def _processor() -> Answer:
    return Answer(True, f"{cpu_model()}, {num_usable_cores()} cores for this process")


def _kernel() -> Answer:
    linux = platform.system() == "Linux"
    detail = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return Answer(linux, detail, None if linux else "run on Linux: windows are memfd, waiting ranks sleep on a futex")


def _memory() -> Answer:
    total, free = memory_bytes("MemTotal"), memory_bytes("MemAvailable")
    if total is None or free is None:
        return Answer(False, "/proc/meminfo does not say")
    return Answer(True, f"{_gib(free)} of {_gib(total)} available (a Buffer's memory table says what it takes)")


def _memory_limit() -> Answer:
    """Of this process's cgroup: windows count against it as they are touched."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return Answer(True, "no limit" if text == "max" else f"{_gib(int(text))} for this container")


def _memfd() -> Answer:
    fd = os.memfd_create("deep_a2a_info")
    os.close(fd)
    return Answer(True, "anonymous shared memory, handed over by file descriptor; /dev/shm is not used")


def _open_files() -> Answer:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= _MIN_FILES
    return Answer(enough, f"soft limit {soft}, hard limit {hard}", None if enough else f"ulimit -n {_MIN_FILES}")


def _address_space() -> Answer:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return Answer(True, "no limit")
    return Answer(False, f"limited to {_gib(soft)}: each rank maps the windows of its node", "ulimit -v unlimited")


def _cpu_backend() -> Answer:
    try:
        import_module("deep_a2a._cpu")
    except ImportError as error:
        remedy = "pip install . in the source tree, with a C++17 compiler (errors of the build are in its output)"
        return Answer(False, f"the native module does not load: {error}", remedy)
    return Answer(True, "ranks are processes of this host, nodes are emulated (ranks_per_node)")


def _nvcc() -> Answer:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = os.pathsep.join(str(Path(home) / "bin") for home in (*homes, "/usr/local/cuda"))
    path = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=places)
    if path is None:
        return Answer(False, "not found", "install the CUDA toolkit (12.0 or later), or set CUDA_HOME or CUDACXX")
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_NVCC_TIMEOUT_S, check=True)
    release = next((line for line in shown.stdout.splitlines() if "release" in line), "version unknown")
    return Answer(True, f"{path}: {release.strip()}")


def _shm() -> Answer:
    native = _guarded(_cpu_backend)
    return Answer(
        native.available, f"between processes of a host{'' if native.available else '; needs the cpu backend'}"
    )


def _nvshmem() -> Answer:
    answer = _package_of_cuda(_NVSHMEM_PACKAGES)
    return Answer(answer.available, f"{answer.detail}; between hosts, needs the cuda backend", answer.remedy)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


_PROBES: tuple[tuple[str, str, Callable[[], Answer]], ...] = (
    ("versions", "deep_a2a", _package("deep-a2a", "pip install . in the source tree")),
    ("versions", "python", _python),
    ("versions", "torch", _package("torch", "pip install torch")),
    ("versions", "numpy", _package("numpy", "pip install numpy")),
    ("machine", "processor", _processor),
    ("machine", "kernel", _kernel),
    ("machine", "memory", _memory),
    ("backends", "cpu", _cpu_backend),
    ("backends", "cuda", cuda_backend),
    ("backends", "emulated", emulated_backend),
    ("backends", "nvcc", _nvcc),
    ("backends", "gpu", gpu),
    ("transports", "shm", _shm),
    ("transports", "nvlink", nvlink),
    ("transports", "nvshmem", _nvshmem),
    ("transports", "nvshmem module", nvshmem_module),
    ("transports", "nvshmem remote", remote_transports),
    ("transports", "nics", nics),
    ("limits", "memfd", _memfd),
    ("limits", "memory limit", _memory_limit),
    ("limits", "open files", _open_files),
    ("limits", "address space", _address_space),
    ("optional", "matplotlib", _package("matplotlib", "pip install 'deep-a2a[bench]' (plots)")),
    ("optional", "cupy", lambda: _package_of_cuda(_CUPY_PACKAGES)),
)
