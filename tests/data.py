"""The random numbers of a case: from its seed alone, so that a rank makes its own share and the oracle everybody's."""

from __future__ import annotations

from dataclasses import dataclass

import reference_math
import torch
from generators import Case


@dataclass(frozen=True)
class Inputs:
    """What one rank calls dispatch with; `payload` and `scales` are what has to arrive."""

    x: torch.Tensor  # BF16 or FP8 [tokens, hidden]
    topk_idx: torch.Tensor  # [tokens, num_topk]
    topk_weights: torch.Tensor  # float32 [tokens, num_topk]
    payload: torch.Tensor
    scales: torch.Tensor | None


def generator(*seeds: int) -> torch.Generator:
    """One stream of random numbers per tuple; hash() of integers is the same in every process."""
    return torch.Generator().manual_seed(hash(seeds) % 2**63)


def inputs(case: Case, rank: int, turn: int = 0) -> Inputs:
    """`turn` 1 is the second dispatch of a cached case: other rows, same routing and weights."""
    num_tokens = case.tokens[rank]
    topk_idx = route(case, num_tokens, generator(case.seed, rank, 1))
    weights = nearly_equal(generator(case.seed, rank, 2), *topk_idx.shape)
    if case.default_weights:
        weights = torch.ones(topk_idx.shape)
    x, scales = rows_to_send(case, num_tokens, generator(case.seed, rank, 3, turn))
    payload = x
    if case.is_cast:
        payload, scales = reference_math.quantize(x, case.fmt, case.scale_format)
    return Inputs(x, topk_idx.to(case.idx_dtype), weights, payload, scales)


def route(case: Case, num_tokens: int, numbers: torch.Generator) -> torch.Tensor:
    """int64 [tokens, num_topk]; distinct experts per token, except for "repeated"."""
    shape, experts = (num_tokens, case.num_topk), case.num_experts
    distinct = torch.rand(num_tokens, experts, generator=numbers).argsort(1)[:, : case.num_topk].contiguous()
    if case.routing == "sparse":
        return torch.where(torch.rand(shape, generator=numbers) < 0.5, -1, distinct)
    if case.routing == "one_expert":
        idx = torch.full(shape, -1)
        idx[:, case.seed % case.num_topk] = case.seed % experts
        return idx
    if case.routing == "one_rank":
        first = case.seed % case.num_ranks * case.local_experts
        local = torch.rand(num_tokens, case.local_experts, generator=numbers).argsort(1)[:, : case.num_topk]
        idx = torch.full(shape, -1)
        idx[:, : local.shape[1]] = first + local
        return idx
    if case.routing == "nowhere":
        return torch.full(shape, -1)
    if case.routing == "repeated":
        return torch.randint(-1, experts, shape, generator=numbers)
    return distinct


def rows_to_send(case: Case, num_tokens: int, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and, for FP8, scales. Any bits at all, where dispatch has not to compute with them."""
    shape = (num_tokens, case.hidden)
    anything = torch.randint(0, 1 << 16, shape, generator=numbers).to(torch.uint16).view(torch.bfloat16)
    if case.is_cast:  # a row in four has any bits as well, infinities and NaN among them
        magnitude = torch.exp2(torch.randint(-20, 20, (num_tokens, 1), generator=numbers).float())
        special = torch.rand(shape, generator=numbers) < 0.01 * (torch.arange(num_tokens) % 4 == 3)[:, None]
        return torch.where(special, anything, (torch.randn(shape, generator=numbers) * magnitude).bfloat16()), None
    if case.fmt == "bf16":
        return anything, None
    x = torch.randint(0, 256, shape, generator=numbers).to(torch.uint8).view(reference_math.FP8_DTYPES[case.fmt])
    groups = (num_tokens, -(-case.hidden // reference_math.GROUP_CHANNELS))
    if case.scale_format == "float32":
        return x, torch.rand(groups, generator=numbers)
    return x, torch.randint(0, 255, groups, generator=numbers).to(torch.uint8)


def nearly_equal(numbers: torch.Generator, *shape: int) -> torch.Tensor:
    """FP32 numbers that are nearly the same or the opposite of each other, and now and then zero: weighted sums of
    few different values then cancel, and show what the rounding of a product has lost."""
    last_bits = torch.randint(0, 8, shape, generator=numbers).float() * 2.0**-23
    sign = torch.randint(0, 2, shape, generator=numbers) * 2 - 1
    return torch.where(torch.rand(shape, generator=numbers) < 0.05, 0.0, sign * (0.7 + last_bits))


def expert_output(case: Case, rank: int, num_rows: int, turn: int = 0) -> torch.Tensor:
    """BF16 [rows, hidden]: few different values, so that sums cancel and hit ties, then any, and special ones."""
    numbers = generator(case.seed, rank, 4, turn)
    shape = (num_rows, case.hidden)
    few = torch.randint(-5, 6, shape, generator=numbers).float() * 1.265625
    few = torch.where(few == 0, -0.0, few).bfloat16()
    wide = (torch.randn(shape, generator=numbers) * torch.exp2(20 * torch.randn(shape, generator=numbers))).bfloat16()
    anything = torch.randint(0, 1 << 16, shape, generator=numbers).to(torch.uint16).view(torch.bfloat16)
    kind = torch.rand(shape, generator=numbers)
    return torch.where(kind < 0.6, few, torch.where(kind < 0.98, wide, anything))


def side_values(case: Case, rank: int, shape: tuple[int, ...]) -> torch.Tensor:
    """FP32 values in all places, also in those that have to be ignored."""
    return torch.randn(shape, generator=generator(case.seed, rank, 5))
