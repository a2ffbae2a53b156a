"""Which ranks share a host, as they find out by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from deep_a2a.bootstrap import host_identity


@dataclass(frozen=True)
class Hosts:
    """By rank: an identity of its host."""

    names: Sequence[str]

    @staticmethod
    def of(group: dist.ProcessGroup) -> Hosts:
        """Collective."""
        names: list[str] = [""] * dist.get_world_size(group)
        dist.all_gather_object(names, host_identity(), group=group)
        return Hosts(names)

    @property
    def count(self) -> int:
        return len(set(self.names))

    def local_rank(self, rank: int) -> int:
        """Which of its host's ranks it is."""
        return self.names[:rank].count(self.names[rank])

    def require_whole_nodes(self, ranks_per_node: int) -> None:
        """Raises ValueError if a node of so many ranks would not lie on one host."""
        for first in range(0, len(self.names), ranks_per_node):
            node = self.names[first : first + ranks_per_node]
            if len(set(node)) > 1:
                raise ValueError(
                    f"ranks_per_node is {ranks_per_node}, but ranks {first} to {first + len(node) - 1} are on "
                    f"{len(set(node))} hosts; expected the ranks of a node on one host, and at most "
                    f"{min(self.names.count(name) for name in self.names)} of them"
                )
