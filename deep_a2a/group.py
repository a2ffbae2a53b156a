"""What a Buffer needs of a process group: who am I, how many are we, and one exchange of bytes with a deadline."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol

from deep_a2a.errors import CommTimeoutError

# Room for one rank's message in an exchange. Fixed, so that ranks need not agree on a length first.
MESSAGE_BYTES = 8192


class Group(Protocol):
    """The ranks that share a Buffer. Anything with these members will do instead of a torch process group."""

    rank: int
    size: int

    def all_gather_bytes(self, message: bytes, timeout_s: float) -> list[bytes]:
        """Give `message` (at most ``MESSAGE_BYTES``), get all ranks' by rank; TimeoutError after `timeout_s`."""


def as_group(group: Any) -> Group:
    """`group` itself if it has the members of ``Group``, else a wrapped torch process group (None: the default one)."""
    dist = sys.modules.get("torch.distributed")  # whoever has one of its groups has imported it
    if group is None or (dist is not None and dist.is_available() and isinstance(group, dist.ProcessGroup)):
        from deep_a2a.torch_group import TorchGroup

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
