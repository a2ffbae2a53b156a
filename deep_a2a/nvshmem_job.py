"""The NVSHMEM job of this process: joined through the caller's process group, or shared with who has joined one before.

A process is in one job at most, for as long as it lives: to leave one is collective, and a Buffer's destroy() waits for
nobody. The first Buffer with several nodes makes the job, of its group's ranks, in their order. Where torch, say, has
made one already, that one is used if it has all ranks of the group.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import deep_a2a.nvshmem_environment as environment
from deep_a2a.bootstrap import host_identity, together
from deep_a2a.errors import CommError
from deep_a2a.group import Group, all_gather
from deep_a2a.nvshmem_library import mapped_files

_T = TypeVar("_T")

# Native modules whose device code the library knows of.
_attached: set[str] = set()


@dataclass(frozen=True)
class Job:
    """Where the ranks of a group are in the job."""

    native: Any
    device: int
    pes: tuple[int, ...]  # by rank
    num_pes: int

    @property
    def is_whole(self) -> bool:
        """Whether the group has every PE: then it may call what is collective over the job."""
        return len(self.pes) == self.num_pes

    def describe(self) -> str:
        """What the library chose to move bytes by, as it stands."""
        choice = self.native.transport_choice(self.device)
        names = {path.name.split(".")[0].removeprefix("nvshmem_transport_") for path in mapped_files()}
        loaded = sorted(names & {"ibgda", "ibrc", "ibdevx", "ucx", "libfabric"})
        how = "kernels drive the NIC" if choice["direct"] else "by proxy thread" if choice["proxy"] else "mapped memory"
        flush = ", GPUDirect writes are flushed" if choice["needs_flush"] else ""
        return f"PE {self.native.my_pe()} of {self.num_pes}, {how}, transports {', '.join(loaded) or 'none'}{flush}"


def join(native: Any, group: Group, device: int, *, heap_bytes: int, num_queues: int, timeout_s: float) -> Job:
    """With all ranks of the group, which all fail if one does. `native` is ``_nvshmem`` or ``_emulated``."""
    mine = {
        "status": native.job_status().name,
        "pe": native.my_pe() if native.job_status().name == "ready" else None,
        "num_pes": native.num_pes() if native.job_status().name == "ready" else None,
        "versions": [native.compiled_version(), native.library_version()],
        "host": host_identity(),
        "problem": environment.shared_queues(),
    }
    states = all_gather(group, mine, timeout_s, "NVSHMEM")
    for rank, state in enumerate(states):
        if state["problem"] is not None:
            raise CommError(f"rank {rank}: {state['problem']}")
    pes = agree(states)
    if pes is None:
        if native.__name__.endswith("_nvshmem"):
            _check_network(states)
        environment.prepare(heap_bytes, num_queues)
        _join_new(native, group, device, timeout_s)
        pes = list(range(group.size))
    elif native.__name__ not in _attached:
        together(group, lambda: native.share_job(device=device), timeout_s, "share the NVSHMEM job")
    _attached.add(native.__name__)
    return Job(native, device, tuple(pes), native.num_pes())


def agree(states: list[dict[str, Any]]) -> list[int] | None:
    """The PE of each rank in a job that they share already; None where they are to make one. Raises CommError."""
    versions = {str(state["versions"]): rank for rank, state in enumerate(states)}
    if len(versions) > 1:
        shown = "; ".join(
            f"rank {rank} has {'.'.join(map(str, states[rank]['versions'][1]))}, compiled with "
            f"{'.'.join(map(str, states[rank]['versions'][0]))}"
            for rank in versions.values()
        )
        raise CommError(f"the ranks have different versions of NVSHMEM: {shown}")
    by_status: dict[str, list[int]] = {}
    for rank, state in enumerate(states):
        by_status.setdefault(state["status"], []).append(rank)
    if list(by_status) == ["none"]:
        return None
    if list(by_status) != ["ready"]:
        shown = ", ".join(f"ranks {ranks}: {status}" for status, ranks in by_status.items())
        raise CommError(
            f"NVSHMEM has been initialized on some ranks of the group and not on others ({shown}); a process is in one "
            "NVSHMEM job: make the first Buffer with several nodes over all ranks that use NVSHMEM, or before others do"
        )
    pes = [state["pe"] for state in states]
    sizes = {state["num_pes"] for state in states}
    if len(sizes) > 1 or len(set(pes)) < len(pes):
        raise CommError(
            f"the ranks of the group are in different NVSHMEM jobs: PEs {pes} of {[s['num_pes'] for s in states]}; a "
            "process is in one job, so that Buffers with several nodes need all their ranks in the same one"
        )
    return pes


def leave(job: Job, group: Group, timeout_s: float) -> None:
    """With all ranks: ends this package's part in the job, and the job if it has no other user. No Buffer may be left.

    Nobody has to call it. A rank that cannot leave keeps the others from waiting for it.
    """
    _attached.discard(job.native.__name__)
    together(group, lambda: within(timeout_s, job.native.leave_job), timeout_s, "leave the NVSHMEM job")


def within(timeout_s: float, call: Callable[[], _T]) -> _T:
    """Runs what has no deadline of its own. TimeoutError after `timeout_s`; then it goes on in a thread of its own."""
    answers: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="deep_a2a-nvshmem", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {timeout_s} s")
    return answers[0]


def _join_new(native: Any, group: Group, device: int, timeout_s: float) -> None:
    def name_it() -> str | None:
        return native.make_unique_id().hex() if group.rank == 0 else None

    unique_id = bytes.fromhex(together(group, name_it, timeout_s, "name the NVSHMEM job")[0])

    def join_it() -> None:
        within(
            timeout_s,
            lambda: native.join_job(unique_id=unique_id, pe=group.rank, num_pes=group.size, device=device),
        )

    together(group, join_it, timeout_s, "join the NVSHMEM job")


def _check_network(states: list[dict[str, Any]]) -> None:
    if len({state["host"] for state in states}) > 1:
        problem = environment.missing_network()
        if problem is not None:
            raise CommError(problem)
