"""Random data of a cell, fresh for each iteration, which every rank can make for every source by itself.

Values are random bits with the exponent narrowed, so that making them costs little beside what is measured: BF16 of
magnitude 2^-7 to 2, FP8 codes without NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_a2a.benchmark.cell import Cell
from deep_a2a.quant import num_scale_groups, quantize
from deep_a2a.routing import groups_for_nodes, synthetic

Payload = tuple[torch.Tensor, torch.Tensor | None]
"""Rows and their scales (None for BF16)."""

_KEEP_BITS, _SET_BITS = 0x83FF - 0x10000, 0x3C00  # of a BF16: sign, 3 exponent bits, mantissa; exponents 120 to 127
_FP8_KEEP_BITS = -0x0808080808080809  # every byte & 0xF7: exponent and mantissa are never all ones
_STREAM_ROUTING, _STREAM_INPUT, _STREAM_EXPERTS = range(3)


@dataclass(frozen=True)
class Routing:
    """topk_idx int64 and topk_weights float32, both [num_tokens, num_topk], of every source rank."""

    topk_idx: list[torch.Tensor]
    topk_weights: list[torch.Tensor]


class Workload:
    """Deterministic in (cell.seed, iteration, source); with `cell.cached` the routing is that of iteration 0.

    Rows are drawn on `device`, and differ from device to device; routing is drawn on the CPU.
    """

    def __init__(self, cell: Cell, device: torch.device | None = None) -> None:
        self.cell, self.device = cell, device or torch.device("cpu")
        self._groups = None if cell.topk_groups is None else groups_for_nodes(cell.num_nodes, cell.num_experts)

    def routing(self, iteration: int) -> Routing:
        pairs = [self.routing_of(iteration, source) for source in range(self.cell.num_ranks)]
        return Routing([idx for idx, _ in pairs], [weights for _, weights in pairs])

    def routing_of(self, iteration: int, source: int) -> tuple[torch.Tensor, torch.Tensor]:
        """topk_idx and topk_weights of one source, on the CPU."""
        cell = self.cell
        place = self._place(_STREAM_ROUTING, 0 if cell.cached else iteration, source)
        return synthetic(
            cell.routing,
            cell.num_tokens,
            cell.num_experts,
            cell.num_topk,
            cell.num_ranks,
            seed=torch.Generator().manual_seed(place),
            num_groups=self._groups,
            topk_groups=cell.topk_groups,
        )

    def input(self, iteration: int, source: int) -> Payload:
        """What the source passes to dispatch: BF16 rows (to be cast, if dtype is fp8_cast), or E4M3 rows and scales."""
        cell, generator = self.cell, self._generator(_STREAM_INPUT, iteration, source)
        if cell.dtype != "fp8":
            return random_bf16(cell.num_tokens, cell.hidden, generator), None
        rows = _random_bits(cell.num_tokens * cell.hidden, generator).bitwise_and_(_FP8_KEEP_BITS)
        shape = (cell.num_tokens, num_scale_groups(cell.hidden))
        if cell.scale_format == "float32":
            scales = torch.rand(shape, generator=generator, device=self.device).add_(0.5)
        else:
            scales = torch.randint(120, 134, shape, dtype=torch.uint8, generator=generator, device=self.device)
        return rows.view(torch.float8_e4m3fn).view(cell.num_tokens, cell.hidden), scales

    def delivered(self, iteration: int, source: int) -> Payload:
        """What dispatch has to deliver of `input`: the same bytes, or for fp8_cast what the plain cast gives."""
        rows, scales = self.input(iteration, source)
        return quantize(rows, "fp8_e4m3", self.cell.scale_format) if self.cell.dtype == "fp8_cast" else (rows, scales)

    def expert_base(self, iteration: int, source: int) -> torch.Tensor:
        """bf16 [num_tokens, hidden]: what `expert_output` makes the outputs for the source's tokens of."""
        return random_bf16(self.cell.num_tokens, self.cell.hidden, self._generator(_STREAM_EXPERTS, iteration, source))

    def _generator(self, stream: int, iteration: int, source: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self._place(stream, iteration, source))

    def _place(self, stream: int, iteration: int, source: int) -> int:
        return ((self.cell.seed * 3 + stream) * 1_000_003 + iteration) * self.cell.num_ranks + source


def random_bf16(num_rows: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
    """bf16 [num_rows, hidden], random sign, magnitudes 2^-7 to 2."""
    bits = _random_bits(num_rows * hidden * 2, generator).view(torch.int16)
    return bits.bitwise_and_(_KEEP_BITS).bitwise_or_(_SET_BITS).view(torch.bfloat16).view(num_rows, hidden)


def expert_output(base: torch.Tensor, who: torch.Tensor | int) -> torch.Tensor:
    """What expert (or rank) `who` makes of rows of `expert_base`: some bits flipped, others for each `who`.

    base: bf16 [rows, hidden]; who: an id, or ids [rows]. Returns bf16 [rows, hidden], magnitudes 2^-7 to 2. A bijection
    of each row, so that a row from a wrong place does not pass for the right one.
    """
    ids = torch.as_tensor(who, dtype=torch.int64, device=base.device)
    mask = (ids * 40503 % 65536 & 0x83FF).to(torch.int32)
    mask = torch.where(mask >= 0x8000, mask - 0x10000, mask).to(torch.int16)
    return base.view(torch.int16).bitwise_xor(mask.unsqueeze(-1)).view(torch.bfloat16)


def _random_bits(num_bytes: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [num_bytes / 8] of random bits."""
    bits = torch.empty(num_bytes // 8, dtype=torch.int64, device=generator.device)
    return bits.random_(-(2**63), None, generator=generator)
