"""Failures that all ranks hear of at the same point, so that none waits for one that has gone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


class MeasurementError(RuntimeError):
    """A cell failed on some rank; raised on every rank of the group, which may go on with the next cell."""


def attempt(step: Callable[[], object]) -> Exception | None:
    """Runs `step`; returns what it raised."""
    try:
        step()
    except Exception as error:
        return error
    return None


def agree(group: dist.ProcessGroup, error: Exception | None) -> None:
    """Raises MeasurementError on every rank if any of them brings an error. Collective."""
    if largest(group, error is not None)[0] == 0:
        return
    texts: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}", group=group)
    told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None)
    raise MeasurementError(told) from error


def largest(group: dist.ProcessGroup, *values: float) -> list[float]:
    """The largest of all ranks, value by value. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return [float(value) for value in tensor.tolist()]


def total(group: dist.ProcessGroup, *values: int) -> list[int]:
    """The sum over all ranks, value by value. Collective."""
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.SUM, group=group)
    return [int(value) for value in tensor.tolist()]
