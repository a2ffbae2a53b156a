"""Matrix products of an expert layer's size, to run beside communication."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from deep_a2a.benchmark.cell import Cell


class Products:
    """[gemm_rows, hidden] by [hidden, gemm_channels] in BF16, `count` times in a row; all memory is made here."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(cell.seed)
        self.count = 1
        self._cell = cell
        self._left, self._right = (
            torch.randn(*size, dtype=torch.bfloat16, device=device, generator=generator)
            for size in ((cell.gemm_rows, cell.hidden), (cell.hidden, cell.gemm_channels))
        )
        self._out = torch.empty(cell.gemm_rows, cell.gemm_channels, dtype=torch.bfloat16, device=device)

    def run(self) -> None:
        for _ in range(self.count):
            torch.mm(self._left, self._right, out=self._out)

    def describe(self) -> str:
        cell = self._cell
        size = f"{self.count} x [{cell.gemm_rows}, {cell.hidden}] @ [{cell.hidden}, {cell.gemm_channels}] bf16"
        return f"{size}, told to leave {cell.gemm_leaves} SMs" if cell.gemm_leaves else size


@contextmanager
def leaving(num_sms: int, device: torch.device) -> Iterator[None]:
    """Products leave SMs to others, as far as cuBLASLt can be told to. Nothing to do for 0, or on a CPU."""
    if num_sms == 0 or device.type == "cpu":
        yield
        return
    carve_out: Callable[[int | None], None] = torch._C._set_sm_carveout_experimental
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")  # plain cuBLAS knows no such wish
    carve_out(num_sms)
    try:
        yield
    finally:
        carve_out(None)
        torch.backends.cuda.preferred_blas_library(before)
