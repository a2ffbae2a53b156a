"""The settings of a Buffer: given once, checked once, the same on every rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from deep_a2a._cpu import Layout, Shape
from deep_a2a.memory import MemoryTable, table_of

LayoutName = Literal["rank", "expert", "padded"]

DEFAULT_STAGING_BYTES = 1 << 30
# Those that None stands for something in, and those in bytes, which may need more than 32 bits.
_OPTIONAL = ("expert_capacity", "max_recv_rows", "staging_bytes")
_BITS = {"staging_bytes": 64}


@dataclass(frozen=True)
class Settings:
    """See ``Buffer`` for their meaning."""

    num_ranks: int
    ranks_per_node: int
    hidden: int
    num_experts: int
    num_topk: int
    num_max_tokens_per_rank: int
    layout: LayoutName = "rank"
    expert_alignment: int = 1
    expert_capacity: int | None = None
    max_recv_rows: int | None = None
    num_slots: int = 2
    num_lanes: int = 2
    staging_bytes: int | None = None

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    def shape(self) -> Shape:
        """The native form. Raises TypeError or ValueError naming the argument, what came and what was expected."""
        self._check_types()
        capacity = self.expert_capacity
        if capacity is None:
            capacity = self.num_ranks * self.num_max_tokens_per_rank if self.layout == "padded" else 0
        elif self.layout != "padded":
            raise ValueError(f"expert_capacity is for layout 'padded', got {capacity} with layout {self.layout!r}")
        if self.max_recv_rows is not None and self.max_recv_rows < 1:
            raise ValueError(f"max_recv_rows must be at least 1 or None, got {self.max_recv_rows}")
        if self.staging_bytes is not None and self.staging_bytes < 1:
            raise ValueError(f"staging_bytes must be at least 1 or None, got {self.staging_bytes}")
        return Shape(
            num_ranks=self.num_ranks,
            ranks_per_node=self.ranks_per_node,
            layout=getattr(Layout, self.layout),
            hidden=self.hidden,
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            max_tokens=self.num_max_tokens_per_rank,
            expert_alignment=self.expert_alignment,
            expert_capacity=capacity,
            max_recv_rows=self.max_recv_rows or 0,
            num_slots=self.num_slots,
            num_lanes=self.num_lanes,
            staging_bytes=DEFAULT_STAGING_BYTES if self.staging_bytes is None else self.staging_bytes,
        )

    def _check_types(self) -> None:
        if self.layout not in ("rank", "expert", "padded"):
            raise ValueError(f"layout must be 'rank', 'expert' or 'padded', got {self.layout!r}")
        for name, value in asdict(self).items():
            if name == "layout" or (name in _OPTIONAL and value is None):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
            bits = _BITS.get(name, 32)
            if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
                raise ValueError(f"{name} must fit {bits} bits, got {value}")


def memory_table(*, num_ranks: int, ranks_per_node: int | None = None, **settings: Any) -> MemoryTable:
    """The memory that ``Buffer(group, **settings)`` would take on each rank, without a group and without taking it.

    `settings` are those of ``Buffer``: hidden, num_experts, num_topk, num_max_tokens_per_rank, layout and so on.
    Raises ValueError or TypeError as ``Buffer`` does.
    """
    nodes = num_ranks if ranks_per_node is None else ranks_per_node
    return table_of(Settings(num_ranks=num_ranks, ranks_per_node=nodes, **settings).shape())
