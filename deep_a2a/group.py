"""What a Buffer needs of a process group: who am I, how many are we, and one exchange of bytes with a deadline."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from deep_a2a.errors import CommTimeoutError

# Room for one rank's message in an exchange. Fixed, so that ranks need not agree on a length first.
MESSAGE_BYTES = 8192


class Group(Protocol):
    """The ranks that share a Buffer. Anything with these members will do instead of a torch process group."""

    rank: int
    size: int

    def all_gather_bytes(self, message: bytes, timeout_s: float) -> list[bytes]:
        """Give `message` (at most ``MESSAGE_BYTES``), get all ranks' by rank; TimeoutError after `timeout_s`."""


class TorchGroup:
    """A ``torch.distributed`` process group of any backend (None: the default group)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "group is a torch process group, but torch.distributed is not initialized: "
                "call torch.distributed.init_process_group first"
            )
        self.group = group if group is not None else dist.group.WORLD
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group does not contain this rank")

    def all_gather_bytes(self, message: bytes, timeout_s: float) -> list[bytes]:
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        padded = message.ljust(MESSAGE_BYTES, b"\0")
        mine = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            work = dist.all_gather(gathered, mine, group=self.group, async_op=True)
            assert work is not None
            finished = work.wait(timeout=timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise TimeoutError(str(error)) from error
        if not finished:
            raise TimeoutError(f"no answer from all ranks within {timeout_s} s")
        return [bytes(row.cpu().numpy().tobytes()).rstrip(b"\0") for row in gathered]


def as_group(group: Any) -> Group:
    """`group` itself if it has the members of ``Group``, else a wrapped torch process group (None: the default one)."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return TorchGroup(group)
    if all(hasattr(group, name) for name in ("rank", "size", "all_gather_bytes")):
        checked: Group = group
        return checked
    raise TypeError(
        "group must be a torch.distributed.ProcessGroup, None, or an object with rank, size and all_gather_bytes; "
        f"got {type(group).__name__}"
    )


def all_gather(group: Group, message: dict[str, Any], timeout_s: float, purpose: str) -> list[dict[str, Any]]:
    """Exchange small JSON messages; `purpose` is named when a rank does not come."""
    encoded = json.dumps(message).encode()
    if len(encoded) > MESSAGE_BYTES:
        raise ValueError(f"a message of {len(encoded)} bytes is too long to exchange (at most {MESSAGE_BYTES})")
    try:
        return [json.loads(answer) for answer in group.all_gather_bytes(encoded, timeout_s)]
    except TimeoutError as error:
        raise CommTimeoutError(
            f"rank {group.rank} gave up after {timeout_s} s: not all {group.size} ranks of the group came to {purpose} "
            f"({error})"
        ) from error
