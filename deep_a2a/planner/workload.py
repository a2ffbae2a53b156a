"""What is sent: ranks, tokens, rows, and the routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from deep_a2a.settings import LayoutName, Settings

Dtype = Literal["bf16", "fp8"]
RoutingName = Literal["uniform", "zipf", "gate"]


@dataclass(frozen=True)
class Workload:
    """One dispatch and one combine on every rank; the defaults are DeepSeek-V3's shape on 64 ranks.

    Attributes:
        num_ranks, ranks_per_node: of the job; the experts are spread over the ranks evenly and in order.
        num_tokens: of each rank.
        hidden: channels of a token.
        num_experts, num_topk: global number of experts, and those of a token.
        dtype: of dispatched rows; combine always moves BF16. FP8 rows have a float32 scale for 128 channels.
        layout: how rows arrive, see ``Buffer``.
        routing: ``"uniform"`` and ``"zipf"`` are those of `deep_a2a.routing.synthetic`, ``"gate"`` is
            `deep_a2a.routing.node_limited_topk` on random scores.
        topk_groups: groups of experts that a token keeps, None for all.
        num_groups: groups of consecutive experts, None for one a node.
        staging_bytes: of a lane, between nodes, see ``Buffer``.

    Raises:
        TypeError, ValueError: a value is of the wrong kind or out of range; the message names it.
    """

    num_ranks: int = 64
    ranks_per_node: int = 8
    num_tokens: int = 4096
    hidden: int = 7168
    num_experts: int = 256
    num_topk: int = 8
    dtype: Dtype = "fp8"
    layout: LayoutName = "rank"
    routing: RoutingName = "uniform"
    topk_groups: int | None = None
    num_groups: int | None = None
    staging_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("dtype", get_args(Dtype)), ("routing", get_args(RoutingName))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
        self.settings().shape()
        if self.dtype == "fp8" and self.hidden % 16:
            raise ValueError(f"hidden is {self.hidden}, expected a multiple of 16 (FP8 rows of whole 16 bytes)")
        self._check_groups()

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def groups(self) -> int:
        """Groups of experts: as asked for, else one a node."""
        return self.num_nodes if self.num_groups is None else self.num_groups

    @property
    def kept_groups(self) -> int:
        """Groups that a token keeps."""
        return self.groups if self.topk_groups is None else self.topk_groups

    def settings(self, max_recv_rows: int | None = None) -> Settings:
        """Those of a Buffer for this."""
        return Settings(
            num_ranks=self.num_ranks,
            ranks_per_node=self.ranks_per_node,
            hidden=self.hidden,
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            num_max_tokens_per_rank=self.num_tokens,
            layout=self.layout,
            max_recv_rows=max_recv_rows,
            staging_bytes=self.staging_bytes,
        )

    def _check_groups(self) -> None:
        for name in ("num_groups", "topk_groups"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected an int")
        if self.num_groups is not None and (self.num_groups < 1 or self.num_experts % self.num_groups):
            raise ValueError(f"num_groups is {self.num_groups}, expected a divisor of num_experts = {self.num_experts}")
        if self.topk_groups is None:
            return
        if not 1 <= self.topk_groups <= self.groups:
            raise ValueError(f"topk_groups is {self.topk_groups}, expected 1 to {self.groups}, the number of groups")
        candidates = self.topk_groups * self.num_experts // self.groups
        if self.num_topk > candidates:
            raise ValueError(
                f"num_topk is {self.num_topk}, expected at most {candidates}: {self.topk_groups} groups of "
                f"{self.num_experts // self.groups} experts"
            )
