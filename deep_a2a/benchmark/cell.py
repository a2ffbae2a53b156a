"""What one measurement runs: shape, topology, payload, layout, routing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from deep_a2a.benchmark.record import (
    Backend,
    Dtype,
    Input,
    Layout,
    Output,
    Record,
    ScaleFormat,
    StreamName,
    require_choice,
)
from deep_a2a.quant import num_scale_groups
from deep_a2a.routing import KINDS

Subject = Literal["operations", "overlap"]

_CHOICES = {
    "subject": Subject,
    "backend": Backend,
    "dtype": Dtype,
    "layout": Layout,
    "output": Output,
    "input": Input,
    "scale_format": ScaleFormat,
    "stream": StreamName,
}


@dataclass(frozen=True)
class Cell:
    """One cell of a benchmark's matrix. Field names are those of `Record`.

    Lent inputs lie in the window, copied ones in ordinary tensors; where the backend reads any tensor in place the two
    are the same. `num_iters` iterations count, after `num_warmup` that do not. `num_sms` is None for the backend's
    default, `stream` where its kernels run. `graph` replays captured CUDA graphs. Subject "operations" is dispatch and
    combine, each by itself; "overlap" is both of them beside matrix products of [gemm_rows, hidden] by [hidden,
    gemm_channels], told to leave `gemm_leaves` SMs to others. Raises ValueError, naming the field.
    """

    subject: Subject = "operations"
    num_ranks: int = 8
    ranks_per_node: int = 8
    num_tokens: int = 512
    hidden: int = 7168
    num_topk: int = 8
    num_experts: int = 256
    dtype: Dtype = "bf16"
    scale_format: ScaleFormat = "float32"
    layout: Layout = "rank"
    routing: str = "uniform"
    topk_groups: int | None = None
    cached: bool = False
    output: Output = "leased"
    input: Input = "lent"
    host_sync: bool = False
    backend: Backend = "cpu"
    num_sms: int | None = None
    stream: StreamName = "own"
    graph: bool = False
    gemm_rows: int = 16384
    gemm_channels: int = 4096
    gemm_leaves: int = 0
    num_iters: int = 20
    num_warmup: int = 2
    seed: int = 0
    checked: bool = True
    baseline: bool = True

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            require_choice(name, getattr(self, name), get_args(kind))
        require_choice("routing", self.routing, KINDS)
        for name in (*_COUNTS, "num_sms"):
            if name == "num_sms" and self.num_sms is None:
                continue
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name, of in (("ranks_per_node", "num_ranks"), ("num_ranks", "num_experts")):
            if getattr(self, of) % getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, which does not divide {of}={getattr(self, of)}")
        if self.num_topk > self.num_experts:
            raise ValueError(f"num_topk is {self.num_topk}; expected at most num_experts={self.num_experts}")
        payload_bytes = self.hidden * self.bytes_per_channel
        if payload_bytes % 16:
            raise ValueError(
                f"hidden is {self.hidden}: a {self.dtype} row has {payload_bytes} bytes; expected a multiple of 16"
            )
        if self.topk_groups is not None and not 1 <= self.topk_groups <= self.num_nodes:
            raise ValueError(f"topk_groups is {self.topk_groups}; expected 1 to {self.num_nodes}, the number of nodes")
        self._check_backend()

    def _check_backend(self) -> None:
        """What only some backends have."""
        if self.backend == "cpu":
            if self.num_sms is not None:
                raise ValueError(f"num_sms is {self.num_sms}; expected None with backend cpu, which has none")
            if self.subject == "overlap":
                raise ValueError("subject is overlap; expected operations with backend cpu, which has one stream")
        if (self.graph and self.stream == "own") or (self.subject == "overlap" and self.stream == "current"):
            raise ValueError(f"stream is {self.stream}; expected current for graphs, and own for subject overlap")
        if self.graph and (self.backend != "cuda" or self.host_sync or self.subject == "overlap"):
            raise ValueError(
                f"graph is True with backend {self.backend}, host_sync {self.host_sync}, subject {self.subject}; "
                "expected cuda, False and operations"
            )
        if self.subject == "overlap" and (self.layout != "rank" or self.host_sync):
            raise ValueError(
                f"layout is {self.layout}, host_sync {self.host_sync} with subject overlap; expected rank and False"
            )

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def bytes_per_channel(self) -> int:
        return 2 if self.dtype == "bf16" else 1

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one dispatched row."""
        if self.dtype == "bf16":
            return 0
        return num_scale_groups(self.hidden) * (4 if self.scale_format == "float32" else 1)

    @property
    def row_bytes(self) -> int:
        """Payload and scales of one dispatched row."""
        return self.hidden * self.bytes_per_channel + self.scale_bytes

    def describe(self) -> str:
        """The cell in a few words."""
        parts = [
            self.backend,
            *(["overlap"] if self.subject == "overlap" else []),
            *(["graph"] if self.graph else []),
            *([] if self.backend == "cpu" else [f"{self.num_sms or 'default'} SMs"]),
            f"{self.num_nodes}x{self.ranks_per_node} ranks",
            f"{self.num_tokens} tokens of {self.hidden}",
            self.dtype,
            f"layout {self.layout}",
            f"{self.routing} routing",
            "cached" if self.cached else "counted",
            f"output {self.output}",
            f"input {self.input}",
        ]
        return ", ".join(parts)

    def record(self, **measured: Any) -> Record:
        """A record of this cell with what was measured; `measured` wins over the cell's own fields."""
        values = {name: getattr(self, name) for name in _SHARED_FIELDS}
        scale_format = None if self.dtype == "bf16" else self.scale_format
        stream = None if self.backend == "cpu" else self.stream
        return Record(**{**values, "scale_format": scale_format, "stream": stream, **measured})


_COUNTS = (
    "num_ranks", "ranks_per_node", "num_tokens", "hidden", "num_topk", "num_experts", "num_iters", "gemm_rows",
    "gemm_channels",
)  # fmt: skip
_SHARED_FIELDS = {each.name for each in fields(Cell)} & {each.name for each in fields(Record)} - {"baseline"}
