"""The figures of others, from bench/results/published.json, beside what the model says to the same workload."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deep_a2a.settings import LayoutName

from .plan import OperationPlan, make_plan
from .rates import H100, H200, H800, Hardware
from .traffic import Op
from .workload import Dtype, Workload

# Beside the package in a clone; an installation has no result files.
DEFAULT_FIGURES = Path(__file__).parents[2] / "bench" / "results" / "published.json"
WITHIN = 0.15
_GPUS: dict[str, Hardware] = {"H100": H100, "H200": H200, "H800": H800}


@dataclass(frozen=True)
class Figure:
    """A published operation. Its time, or the logical GB/s that stand for it, is given.

    Attributes:
        listed: one that the planner has to answer for; the others are context.
        logical_gbs: bytes of rows to all nodes, the own one included, over the time. On one node: of rows received.
        counted_row_bytes: what the publisher counts for a row; None for payload and scales.
    """

    package: str
    gpu: str
    source: str
    listed: bool
    op: Op
    dtype: Dtype
    layout: LayoutName
    num_ranks: int
    ranks_per_node: int
    num_sms: int | None
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    topk_groups: int | None = None
    total_us: float | None = None
    logical_gbs: float | None = None
    counted_row_bytes: int | None = None

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def workload(self) -> Workload:
        return Workload(
            num_ranks=self.num_ranks,
            ranks_per_node=self.ranks_per_node,
            num_tokens=self.num_tokens,
            hidden=self.hidden,
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            dtype=self.dtype,
            layout=self.layout,
            topk_groups=self.topk_groups,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Figure:
        names = cls.__dataclass_fields__
        given = {name: value for name, value in values.items() if name in names}
        if "total_us_range" in values:
            given["total_us"] = statistics.fmean(values["total_us_range"])
        return cls(**{"listed": False, **given})


@dataclass(frozen=True)
class Comparison:
    """A figure and the model's answer to it."""

    figure: Figure
    model: OperationPlan

    @property
    def counted_bytes(self) -> float:
        """What the figure's GB/s count, of one GPU."""
        traffic = self.model.traffic
        rows = traffic.node_rows if self.figure.num_nodes > 1 else traffic.logical_rows
        return rows * (self.figure.counted_row_bytes or traffic.row_bytes)

    @property
    def model_gbs(self) -> float:
        return self.counted_bytes / self.model.estimate.total_us / 1e3

    @property
    def published_us(self) -> float:
        """The figure's time; of GB/s, what they come to."""
        if self.figure.total_us is not None:
            return self.figure.total_us
        assert self.figure.logical_gbs is not None
        return self.counted_bytes / self.figure.logical_gbs / 1e3

    @property
    def deviation(self) -> float:
        """The model's time over the published one, less 1: below 0 where the model is faster."""
        return self.model.estimate.total_us / self.published_us - 1

    @property
    def close(self) -> bool:
        return abs(self.deviation) <= WITHIN


def read_figures(path: Path) -> list[Figure]:
    """Those that say how many GB/s or us, on a GPU that the model has rates for.

    Raises:
        ValueError: the file is not there, or is none of figures.
    """
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return [Figure.from_json(values) for values in figures if values["gpu"] in _GPUS]
    except OSError as error:
        raise ValueError(
            f"figures is {path}, expected bench/results/published.json of a clone of the repository: {error.strerror}"
        ) from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"figures is {path}, expected a file as bench/results/published.json: {error}") from error


def compare(figures: Iterable[Figure], rates: Mapping[str, float] | None = None) -> list[Comparison]:
    """The model of each figure's workload, with as many SMs, on its GPU.

    `rates`: fields of `Hardware` that are not the GPU's.
    """
    return [Comparison(figure, _model(figure, rates or {})) for figure in figures]


def _model(figure: Figure, rates: Mapping[str, float]) -> OperationPlan:
    plan = make_plan(figure.workload, replace(_GPUS[figure.gpu], **rates), figure.num_sms)
    return plan.dispatch if figure.op == "dispatch" else plan.combine


def listed(comparisons: Sequence[Comparison]) -> list[Comparison]:
    return [each for each in comparisons if each.figure.listed]


def context(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """What others have published beside that; not what was measured for this project."""
    return [each for each in comparisons if not each.figure.listed and each.figure.gpu != "H200"]
