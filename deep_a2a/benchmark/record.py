"""One measurement (`Record`) and the file that keeps measurements (`ResultFile`).

The same schema serves every backend: what a backend does not have (SMs, GPUs, kernel time) is None.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from deep_a2a.benchmark.figures import Figures
from deep_a2a.benchmark.wire_bytes import LINK_CLASSES as LINK_CLASSES
from deep_a2a.benchmark.wire_bytes import WireBytes as WireBytes

Op = Literal["dispatch", "combine", "overlap"]
Backend = Literal["cpu", "cuda", "emulated"]
Dtype = Literal["bf16", "fp8", "fp8_cast"]
Layout = Literal["rank", "expert", "padded"]
Output = Literal["leased", "owned"]
Input = Literal["lent", "copied"]
StreamName = Literal["own", "current"]
ScaleFormat = Literal["float32", "ue8m0"]

_OVERLAP_TIMES = ("gemm_alone_us", "gemm_beside_us", "comm_alone_us", "both_us")
_OVERLAP_FIELDS = (*_OVERLAP_TIMES, "gemm")
_DEVICE_FIELDS = ("devices", "slowest_us", "run")
_NETWORK_FIELDS = (
    "network_put_bytes", "network_least_bytes", "network_ceiling_gbs", "network_ceiling_of",
    "network_ceiling_at_sms_gbs", "network_ratio",
)  # fmt: skip
_RATES = ("wire_gbs", "logical_gbs", "gbs_per_sm", "link_efficiency")
_NETWORK_RATES = ("nvlink_gbs", "network_gbs", "network_header_share")
_CHOICES = {"op": Op, "backend": Backend, "dtype": Dtype, "layout": Layout, "output": Output, "input": Input}
_COUNT_FIELDS = ("num_ranks", "ranks_per_node", "num_tokens", "hidden", "num_topk", "num_experts")
_POSITIVE_FIELDS = (
    "total_us", "kernel_us", "baseline_us", "ceiling_gbs", "link_time_ratio", "slowest_us", *_OVERLAP_TIMES,
    "network_ceiling_gbs", "network_ceiling_at_sms_gbs", "network_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Record(Figures):
    """One operation, measured.

    Times are in microseconds: of the slowest rank, median over `num_iters` iterations. `total_us` counts from the
    common release of all ranks until the outputs may be read; `kernel_us` is the main kernel alone (cuda).
    `wire_bytes` and `logical_bytes` are of the busiest rank; logical bytes are received rows, own rows included.
    `ceiling_gbs` is what the link within a node carries per rank (1e9 bytes a second), measured in the same run as
    `ceiling_of` says; `link_time_ratio` is `total_us` over the time that the link class which takes longest needs at
    its ceiling, of a node or of the network. `baseline_us` is
    the same work done by `baseline` in the same run. `checked` is True only if the results of every counted iteration
    were compared with a plain computation. `topk_groups` is None without node-limited routing, `scale_format` None
    for BF16 payloads. `stream` is where the kernels run: on one of the Buffer or on the caller's. `num_sms` is None
    for the backend's default. With fewer `num_gpus` than `num_ranks` ranks share GPUs, and part of what counts as wire
    bytes never leaves its GPU.

    Records with `op="overlap"` have communication (a dispatch and a combine) beside matrix products, as `gemm` says:
    the products alone and beside communication, communication alone, and both together, which is `total_us` as well.
    Their `link_time_ratio` is that of communication alone.

    Records with `devices`, the GPU of each rank, have all ranks in one process (bench/kernels.py): `total_us`,
    `wire_bytes`, `logical_bytes` and `ceiling_gbs` are those of rank 0. Older ones timed all ranks: `slowest_us`.
    `run` numbers the runs of a file that was put together from several.

    Records of several nodes have `network_put_bytes`, what the backend says that all ranks together put to other nodes,
    headers included, and `network_least_bytes`, one row for each token and other node that it goes to.
    `network_ceiling_gbs` is what plain puts carried per rank in the same run, as `network_ceiling_of` says,
    `network_ceiling_at_sms_gbs` the same with no more than `num_sms` SMs; `network_ratio` is `total_us` over the time
    that `wire_bytes.network` need at that ceiling. The cpu backend, whose network is memory, has no ceiling of it.
    """

    op: Op
    backend: Backend
    dtype: Dtype
    layout: Layout
    cached: bool
    output: Output
    input: Input
    routing: str
    num_ranks: int
    ranks_per_node: int
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    total_us: float
    wire_bytes: WireBytes
    logical_bytes: int
    checked: bool
    host_sync: bool
    num_iters: int
    topk_groups: int | None = None
    num_sms: int | None = None
    num_gpus: int | None = None
    stream: StreamName | None = None
    kernel_us: float | None = None
    ceiling_gbs: float | None = None
    ceiling_of: str | None = None
    link_time_ratio: float | None = None
    baseline: str | None = None
    baseline_us: float | None = None
    graph: bool = False
    scale_format: ScaleFormat | None = None
    gemm_alone_us: float | None = None
    gemm_beside_us: float | None = None
    comm_alone_us: float | None = None
    both_us: float | None = None
    gemm: str | None = None
    devices: tuple[int, ...] | None = None
    slowest_us: float | None = None
    run: int | None = None
    network_put_bytes: int | None = None
    network_least_bytes: int | None = None
    network_ceiling_gbs: float | None = None
    network_ceiling_of: str | None = None
    network_ceiling_at_sms_gbs: float | None = None
    network_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            require_choice(name, getattr(self, name), get_args(kind))
        scale_formats = (None,) if self.dtype == "bf16" else get_args(ScaleFormat)
        if self.scale_format not in scale_formats:
            raise ValueError(f"scale_format is {self.scale_format!r} with dtype {self.dtype}; expected {scale_formats}")
        if self.stream is not None:
            require_choice("stream", self.stream, get_args(StreamName))
        for name in _COUNT_FIELDS:
            _require_count(name, getattr(self, name), least=0 if name == "num_tokens" else 1)
        _require_count("num_iters", self.num_iters, least=1)
        _require_count("logical_bytes", self.logical_bytes, least=0)
        if self.num_ranks % self.ranks_per_node:
            raise ValueError(
                f"ranks_per_node is {self.ranks_per_node}; expected a divisor of num_ranks={self.num_ranks}"
            )
        for name in _POSITIVE_FIELDS:
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or value <= 0):
                raise ValueError(f"{name} is {value!r}; expected a positive number")
        if (self.baseline is None) != (self.baseline_us is None):
            raise ValueError(
                f"baseline is {self.baseline!r}, baseline_us is {self.baseline_us!r}; expected both or neither"
            )
        given = [name for name in _OVERLAP_FIELDS if getattr(self, name) is not None]
        expected = list(_OVERLAP_FIELDS) if self.op == "overlap" else []
        if given != expected:
            raise ValueError(f"op {self.op!r} has the overlap fields {given}; expected {expected}")
        self._check_devices()
        self._check_network()

    def _check_network(self) -> None:
        given = [name for name in _NETWORK_FIELDS if getattr(self, name) is not None]
        if given and self.num_nodes == 1:
            raise ValueError(f"there is one node, but {', '.join(given)} of several; expected None")
        for name in ("network_put_bytes", "network_least_bytes"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name), least=0)

    def _check_devices(self) -> None:
        if self.devices is None and self.slowest_us is not None:
            raise ValueError(f"slowest_us is {self.slowest_us!r} and devices is None; expected None without devices")
        if self.devices is not None and len(self.devices) != self.num_ranks:
            raise ValueError(f"devices is {self.devices!r}; expected one for each of num_ranks={self.num_ranks}")
        for device in self.devices or ():
            _require_count("a device of devices", device, least=0)
        if self.slowest_us is not None and self.slowest_us < self.total_us:
            raise ValueError(f"slowest_us is {self.slowest_us!r}; expected at least total_us={self.total_us!r}")
        if self.run is not None:
            _require_count("run", self.run, least=1)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values. Fields that only some records have appear only there.

        What follows from the others is written for whoever reads the file: rates, and with several nodes those of
        their links.
        """
        values = dataclasses.asdict(self)
        if self.op != "overlap":
            for name in _OVERLAP_FIELDS:
                del values[name]
        names = () if self.op == "overlap" else (*_RATES, *(_NETWORK_RATES if self.num_nodes > 1 else ()))
        rates = {name: getattr(self, name) for name in names}
        values |= {name: float(f"{rate:.6g}") for name, rate in rates.items() if rate is not None}
        rare = (*_DEVICE_FIELDS, *_NETWORK_FIELDS)
        return {name: value for name, value in values.items() if value is not None or name not in rare}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The inverse of `to_json`; unknown and missing fields raise ValueError."""
        values = {name: value for name, value in values.items() if name not in (*_RATES, *_NETWORK_RATES)}
        known = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        unknown, missing = sorted(set(values) - known), sorted(required - set(values))
        if unknown or missing:
            raise ValueError(f"record has unknown fields {unknown} and lacks {missing}")
        plain = {**values, "wire_bytes": WireBytes(**values["wire_bytes"])}
        if plain.get("devices") is not None:
            plain["devices"] = tuple(plain["devices"])
        return cls(**plain)


@dataclass(frozen=True)
class ResultFile:
    """What one run of a benchmark leaves behind: where, how and when it ran, and its records."""

    machine: Mapping[str, Any]
    command: str
    date: str
    records: Sequence[Record] = field(default_factory=tuple)

    def write(self, path: Path) -> None:
        """Writes JSON, one record a line, so that two runs can be compared by `diff`."""
        head = {"machine": dict(self.machine), "command": self.command, "date": self.date}
        lines = json.dumps(head, indent=2).removesuffix("\n}")
        records = ",\n".join("    " + json.dumps(record.to_json()) for record in self.records)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{lines},\n  "records": [\n{records}\n  ]\n}}\n', encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ResultFile:
        values = json.loads(path.read_text(encoding="utf-8"))
        records = tuple(Record.from_json(record) for record in values["records"])
        return cls(values["machine"], values["command"], values["date"], records)


def require_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _require_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer, {least} or more")
