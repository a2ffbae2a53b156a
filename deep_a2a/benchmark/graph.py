"""The Buffer's operations as captured CUDA graphs, replayed with new data and new routing in the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deep_a2a import Buffer
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.contenders import BufferContender
from deep_a2a.benchmark.workload import Payload


class GraphContender(BufferContender):
    """Three graphs: dispatch, combine, and the release of the result. They are replayed once there was a `capture`.

    The buffer has to work on the caller's stream: on one of its own, the graphs would wait for each other's events.
    """

    def __init__(self, buffer: Buffer, cell: Cell) -> None:
        super().__init__(buffer, cell)
        self._settled: dict[str, torch.Tensor] = {}
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def capture(self, x: Payload, topk_idx: torch.Tensor, topk_weights: torch.Tensor, y: torch.Tensor) -> None:
        """Everything has to have run once before: nothing may be loaded or made for the first time while captured."""
        self.load(x, topk_idx, topk_weights)
        cuda: Any = torch.cuda  # whose streams are untyped in some versions
        stream = cuda.Stream()  # one for all three, so that none waits for another's events
        self._graphs["dispatch"] = captured(super().dispatch, stream)
        self.load_expert_output(y)
        self._graphs["combine"] = captured(super().combine, stream)
        self._graphs["finish"] = captured(self._current.release, stream)

    def dispatch(self) -> None:
        self._replay("dispatch", super().dispatch)

    def combine(self) -> None:
        self._replay("combine", super().combine)

    def finish(self) -> None:
        self._replay("finish", super().finish)

    def close(self) -> None:
        """The graphs go before the memory that they use."""
        self._graphs.clear()
        self._result = None
        super().close()

    def _replay(self, name: str, eagerly: Callable[[], None]) -> None:
        if name in self._graphs:
            self._graphs[name].replay()
        else:
            eagerly()

    def _settle(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self._settled:
            self._settled[name] = tensor.clone()
        return self._settled[name].copy_(tensor)


def captured(operation: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of what `operation` launches. Other threads (NCCL's among them) may go on meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        operation()
    return graph
