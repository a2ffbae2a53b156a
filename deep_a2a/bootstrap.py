"""How the ranks of a Buffer find each other, compare their settings, and fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deep_a2a.errors import CommError, CommTimeoutError, MismatchError
from deep_a2a.group import Group, all_gather

Member = dict[str, Any]
"""What one rank tells the others before there is a window; ``"host"`` is its host's identity."""


def host_identity() -> str:
    """The same for processes of one running kernel, different otherwise."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def compare(settings: list[dict[str, Any]]) -> None:
    """Raise MismatchError, naming every setting in which a rank differs from rank 0."""
    differences = [
        f"{name} is {settings[0].get(name)!r} on rank 0 and {other.get(name)!r} on rank {rank}"
        for rank, other in enumerate(settings)
        for name in settings[0]
        if other.get(name) != settings[0].get(name)
    ]
    if differences:
        raise MismatchError("the ranks were given different settings: " + "; ".join(differences))


def ranks_per_host(hosts: list[str]) -> int:
    """Consecutive ranks that share a host; the same number on every host."""
    count = next((rank for rank, host in enumerate(hosts) if host != hosts[0]), len(hosts))
    for rank, host in enumerate(hosts):
        if host != hosts[rank - rank % count] or (rank % count == 0 and hosts.index(host) != rank):
            raise ValueError(
                f"ranks_per_node must be given: the group's ranks are not spread over hosts in equal runs (rank {rank})"
            )
    return count


def meet(
    group: Group, settings: dict[str, Any], member: Member | None, error: Exception | None, timeout_s: float
) -> list[Member]:
    """Compare settings on every rank. A rank whose own are bad brings `error`, and all ranks raise."""
    mine = {"settings": None if error else settings, "error": brief(error), "member": member}
    answers = all_gather(group, mine, timeout_s, "Buffer()")
    if error is not None:
        raise error
    for rank, answer in enumerate(answers):
        if answer["error"] is not None:
            raise CommError(f"rank {rank} could not make its Buffer: {answer['error']}")
    compare([answer["settings"] for answer in answers])
    return [answer["member"] for answer in answers]


def require_one_host(members: list[Member], rank: int, backend: str, first: int = 0) -> None:
    """`members` are the ranks that have to share it, of which `first` is the first one."""
    elsewhere = [first + other for other, member in enumerate(members) if member["host"] != members[rank]["host"]]
    if elsewhere:
        raise CommError(
            f"backend {backend!r} needs ranks {first} to {first + len(members) - 1} on one host, but ranks {elsewhere} "
            f"are elsewhere than rank {first + rank}"
        )


def together(group: Group, step: Callable[[], Any], timeout_s: float, purpose: str) -> list[Any]:
    """Run `step` on every rank: what it returned, by rank. Where one fails, all raise, that one its own error."""
    error: Exception | None = None
    value: Any = None
    try:
        value = step()
    except TimeoutError:
        error = CommTimeoutError(
            f"rank {group.rank} gave up after {timeout_s} s: it could not {purpose} with every rank"
        )
    except (ImportError, OSError, RuntimeError, ValueError, MemoryError) as failure:
        error = failure
    mine = {"error": brief(error), "memory": isinstance(error, MemoryError), "value": value}
    answers = all_gather(group, mine, timeout_s, f"a Buffer that wants to {purpose}")
    if error is not None:
        raise error
    for rank, answer in enumerate(answers):
        if answer["error"] is not None:
            kind = MemoryError if answer["memory"] else CommError
            raise kind(f"rank {rank} could not {purpose}: {answer['error']}")
    return [answer["value"] for answer in answers]


def brief(error: Exception | None) -> str | None:
    """An error's text, short enough to exchange."""
    return None if error is None else str(error)[:1000]
