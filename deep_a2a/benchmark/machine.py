"""What a result file says about the machine that it was taken on."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import deep_a2a


def package_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def sources_digest() -> str | None:
    """Of csrc/ and of the package's Python files, names and contents; None where there is no source tree."""
    package = Path(deep_a2a.__file__).parent
    native = package.parent / "csrc"
    if not native.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([*native.rglob("*"), *package.rglob("*.py")]):
        if path.is_file():
            digest.update(f"{path.relative_to(package.parent).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def num_usable_cores() -> int:
    """Cores that this process may run on (fewer than the machine has, in a container or under taskset)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    for line in _read_lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def memory_bytes(field: str = "MemTotal") -> int | None:
    """A field of /proc/meminfo in bytes, or None where there is none."""
    for line in _read_lines(Path("/proc/meminfo")):
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def describe_machine() -> dict[str, Any]:
    """CPU, memory, kernel and the versions that matter: plain values for JSON."""
    total = memory_bytes()
    return {
        "cpu": cpu_model(),
        "cores": num_usable_cores(),
        "memory_gib": None if total is None else round(total / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "deep_a2a": deep_a2a.__version__,
        "sources": sources_digest(),
    }


def driver_version() -> str | None:
    """Of the NVIDIA driver that is loaded, or None."""
    for line in _read_lines(Path("/proc/driver/nvidia/version")):
        numbers = [word for word in line.split() if word[0].isdigit() and "." in word]
        if line.startswith("NVRM") and numbers:
            return numbers[0]
    return None


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
