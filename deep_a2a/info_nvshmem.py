"""What `deep-a2a info` finds out about the network between nodes. Nothing is initialized, which could take for ever."""

from __future__ import annotations

import ctypes.util
import os
from pathlib import Path

import deep_a2a.nvshmem_environment as environment
import deep_a2a.nvshmem_library as library
from deep_a2a.info_answer import Answer

# What a transport of the wheel needs beside it, by the name that the loader looks for.
_NEEDS = {"ibrc": "libibverbs.so.1", "ibdevx": "libmlx5.so.1", "ibgda": "libmlx5.so.1", "ucx": "libucp.so.0"}
_NEEDS["libfabric"] = "libfabric.so.1"


def nvshmem_module() -> Answer:
    """Whether the module that needs NVSHMEM loads, and over which library."""
    try:
        native, found = library.load()
    except library.LibraryError as error:
        return Answer(False, error.problem, error.remedy)
    versions = f"{library.dotted(found.version)}, device code {library.dotted(native.compiled_version())}"
    return Answer(True, f"NVSHMEM {versions}, {found.path}")


def remote_transports() -> Answer:
    """The transports that the library brings, those that could load here first; and the one it would take."""
    folder = _folder()
    if folder is None:
        return Answer(False, "no NVSHMEM library")
    files = folder.glob("nvshmem_transport_*")
    names = sorted(file.name.split(".")[0].removeprefix("nvshmem_transport_") for file in files)
    usable = [name for name in names if name not in _NEEDS or _can_load(_NEEDS[name])]
    lacking = [f"{name} (no {_NEEDS[name]})" for name in names if name not in usable]
    chosen = environment.remote_transport()
    problem = environment.missing_network()
    if problem is None and chosen in names and chosen not in usable:
        problem = f"{chosen} needs {_NEEDS[chosen]}"
    detail = f"{chosen} by the environment; there are {', '.join([*usable, *lacking]) or 'none'}"
    remedy = None if problem is None else "NVSHMEM_REMOTE_TRANSPORT=ucx or libfabric, or NVSHMEM_IB_ENABLE_IBGDA=1"
    return Answer(problem is None, detail if problem is None else f"{detail}; {problem}", remedy)


def nics() -> Answer:
    lines = environment.nics()
    return Answer(bool(lines), "; ".join(lines) if lines else "no RDMA devices in /sys/class/infiniband")


def _folder() -> Path | None:
    mapped = library.mapped_library()
    if mapped is not None:
        return mapped.parent
    for cuda_major in (13, 12):
        try:
            return library.find_library(cuda_major).parent
        except library.LibraryError:
            continue
    return None


def _can_load(name: str) -> bool:
    """Whether the loader would find it, without loading it."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    if any(folder and (Path(folder) / name).exists() for folder in folders):
        return True
    return ctypes.util.find_library(name.split(".")[0].removeprefix("lib")) is not None
