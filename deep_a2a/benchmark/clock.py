"""Timing of a collective: all ranks start at one agreed moment, and the slowest decides.

Ranks share the host, and so CLOCK_MONOTONIC. They agree on a moment a little ahead, sleep until then (so that the
cores are idle and no rank has a head start), and report when they are done. Neither the barrier before nor the one
after is inside the measured time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

_LEAST_MARGIN_NS = 20_000_000
_LARGEST_MARGIN_NS = 500_000_000
_SETTLE_NS = 1_000_000  # gloo's own threads go to sleep after the agreement


class Gate:
    """Releases the ranks of a group together and measures what they then do. Collective."""

    def __init__(self, group: dist.ProcessGroup, margin_ns: int = _LEAST_MARGIN_NS) -> None:
        """margin_ns: how far ahead of the agreement the start lies at first."""
        self._group, self._margin_ns = group, margin_ns

    def measure(self, operation: Callable[[], object]) -> float | None:
        """Microseconds from the common release until the last rank has finished `operation`.

        None, on every rank, if some rank heard of the moment too late to start with the others: the caller repeats
        the measurement (the margin has grown).
        """
        # The largest proposal is that of the last rank to arrive, so the agreement is the barrier as well.
        start_ns = self._largest(time.monotonic_ns() + self._margin_ns)[0]
        remaining_ns = start_ns - time.monotonic_ns()
        late_ns = max(_SETTLE_NS - remaining_ns, 0)
        if remaining_ns > 0:
            time.sleep(remaining_ns * 1e-9)
        operation()
        end_ns, latest_ns = self._largest(time.monotonic_ns(), late_ns)
        if latest_ns > 0:
            self._margin_ns = min(max(2 * self._margin_ns, _LEAST_MARGIN_NS), _LARGEST_MARGIN_NS)
            return None
        self._margin_ns = max(self._margin_ns * 3 // 4, _LEAST_MARGIN_NS)
        return (end_ns - start_ns) * 1e-3

    def _largest(self, *values: int) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return [int(value) for value in tensor.tolist()]
