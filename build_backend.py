"""setuptools' build backend, and beside it one requirement that depends on the machine: NVSHMEM for nvcc's CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (every other hook)

# What _nvshmem is compiled with, and so the oldest that it runs with.
NVSHMEM_VERSION = "3.4.5"


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *nvshmem_wheel()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *nvshmem_wheel()]


def nvshmem_wheel() -> list[str]:
    """None where cmake/nvshmem.cmake would not look for it."""
    off = any(os.environ.get(name, "").upper() == "OFF" for name in ("DEEP_A2A_CUDA", "DEEP_A2A_NVSHMEM"))
    major = None if off or os.environ.get("DEEP_A2A_NVSHMEM_DIR") else cuda_major()
    return [] if major is None else [f"nvidia-nvshmem-cu{major}=={NVSHMEM_VERSION}"]


def cuda_major() -> int | None:
    """Of the nvcc that cmake/cuda.cmake finds; None without one, or with one that it does not take."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = os.pathsep.join(os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda") if home)
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=places)
    if nvcc is None:
        return None
    try:
        shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\d+)\.", shown)
    return int(release[1]) if release and int(release[1]) >= 12 else None
