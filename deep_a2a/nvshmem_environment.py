"""What NVSHMEM is told by environment variables, unless the user has set them: it reads them when a job is joined."""

from __future__ import annotations

import os
from pathlib import Path

_MIB = 2**20
_INFINIBAND = Path("/sys/class/infiniband")


def defaults(heap_bytes: int, num_queues: int) -> dict[str, str]:
    """For symmetric memory of `heap_bytes` on each PE, and kernels that put from `num_queues` blocks at once."""
    return {
        # Multicast is of no use here, and setting it up has hung GPUs.
        "NVSHMEM_DISABLE_NVLS": "1",
        # A heap that grows is mapped to peers in its first part alone (3.4.5, seen with two H200 from 512 MiB on): one
        # of fixed size is mapped as a whole. Beside the windows it holds things of the library's own.
        "NVSHMEM_DISABLE_CUDA_VMM": "1",
        "NVSHMEM_SYMMETRIC_SIZE": str(max(1024 * _MIB, heap_bytes + heap_bytes // 8 + 256 * _MIB)),
        # Queue pairs to each PE: blocks that share one wait for each other's doorbell.
        "NVSHMEM_IBGDA_NUM_RC_PER_PE": str(max(1, num_queues)),
    }


def prepare(heap_bytes: int, num_queues: int) -> None:
    """Sets the defaults. Of no effect once NVSHMEM has been initialized."""
    for name, value in defaults(heap_bytes, num_queues).items():
        os.environ.setdefault(name, value)


def heap_size() -> str:
    """Of the heap on each PE, as the environment has it: bytes, or a number with a unit."""
    return os.environ.get("NVSHMEM_SYMMETRIC_SIZE", "1G")


def is_set(name: str) -> bool:
    """Whether a variable says yes, as NVSHMEM reads it."""
    return os.environ.get(name, "").strip().lower() in ("1", "y", "yes", "t", "true", "on")


def always_puts() -> bool:
    """Whether rows go by NVSHMEM's own puts to GPUs whose memory is mapped, too: for tests, and to measure them."""
    return is_set("DEEP_A2A_NVSHMEM_PUTS")


def remote_transport() -> str:
    """What carries puts between nodes, as the environment has it: ibgda, or one of the proxy's."""
    if is_set("NVSHMEM_IB_ENABLE_IBGDA"):
        return "ibgda"
    return os.environ.get("NVSHMEM_REMOTE_TRANSPORT", "ibrc").strip().lower()


def nics() -> list[str]:
    """A line for each RDMA port of this host: device, port, state, rate, link layer."""
    lines = []
    for port in sorted(_INFINIBAND.glob("*/ports/*")):
        state, rate, layer = (_read(port / name) for name in ("state", "rate", "link_layer"))
        lines.append(f"{port.parent.parent.name} port {port.name} {state.partition(':')[2].strip()} {rate} {layer}")
    return lines


def missing_network() -> str | None:
    """Why no other host can be reached, where that is plain to see: the library would end the process."""
    transport = remote_transport()
    if transport in ("ibrc", "ibgda", "ibdevx") and not nics():
        return (
            f"NVSHMEM's transport {transport!r} needs RDMA devices, and /sys/class/infiniband has none here: set "
            "NVSHMEM_REMOTE_TRANSPORT to 'ucx' or 'libfabric' for another network"
        )
    return None


def shared_queues() -> str | None:
    """Why kernels of two lanes may not put at once: without RC queue pairs, blocks of the same number share a DCI that
    NVSHMEM takes for one block's own."""
    if remote_transport() == "ibgda" and os.environ.get("NVSHMEM_IBGDA_NUM_RC_PER_PE", "").strip() == "0":
        return "NVSHMEM_IBGDA_NUM_RC_PER_PE is 0; expected at least 1, since lanes put at the same time"
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return "?"
