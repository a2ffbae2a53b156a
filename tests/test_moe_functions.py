"""The differentiable dispatch and combine, exactly.

Data are small integers, for which BF16, FP8 with power-of-two scales and every order of summation are exact: results
and gradients equal those of a formula in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from backends import MARKS, device_of
from moe_buffers import BUFFERS, HIDDEN, LOCAL_EXPERTS, NUM_TOPK, TOKENS, make_buffer, num_ranks, poison
from pool import Pool
from torch import Tensor

import deep_a2a
from deep_a2a import moe

FORMATS = {
    "bf16": (moe.BF16, moe.BF16),
    "fp8": (moe.RowFormat("fp8_e4m3", "ue8m0"), moe.RowFormat("fp8_e5m2", "ue8m0")),
}


@dataclass(frozen=True)
class Exact:
    """Tokens of a rank and the gradient that their sum gets. Expert e multiplies a token by 1, 2 or -1 (e modulo 3)."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    grad: Tensor


def exact_inputs(rank: int, num_experts: int) -> Exact:
    numbers = torch.Generator().manual_seed(rank)
    tokens = TOKENS[rank]
    topk_idx = torch.rand(tokens, num_experts, generator=numbers).argsort(dim=1)[:, :NUM_TOPK]
    topk_idx = topk_idx.masked_fill(torch.rand(topk_idx.shape, generator=numbers) < 0.2, -1)
    return Exact(
        x=torch.randint(-3, 4, (tokens, HIDDEN), generator=numbers).float(),
        topk_idx=topk_idx,
        topk_weights=2.0 ** torch.randint(-1, 2, (tokens, NUM_TOPK), generator=numbers),
        grad=torch.randint(-2, 3, (tokens, HIDDEN), generator=numbers).float(),
    )


def factor_of(expert: Tensor) -> Tensor:
    return torch.tensor([1.0, 2.0, -1.0], device=expert.device)[expert % 3]


def expected_exactly(inputs: Exact) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the slots of weight * factor * token, and its gradients for token and weight."""
    x, weights = inputs.x.clone().requires_grad_(), inputs.topk_weights.clone().requires_grad_()
    factors = factor_of(inputs.topk_idx) * (inputs.topk_idx >= 0)
    y = (weights * factors).sum(1, keepdim=True) * x
    y.backward(inputs.grad)  # type: ignore[no-untyped-call]
    assert x.grad is not None and weights.grad is not None
    return y.detach(), x.grad, weights.grad


def multiply_rows(buffer: deep_a2a.Buffer, dispatched: moe.Dispatched) -> Tensor:
    """What a rank's experts do, by the documented meaning of the result's fields."""
    first_expert = buffer.rank * buffer.num_local_experts
    result, rows = dispatched.result, dispatched.rows
    if buffer.layout == "rank":
        factors = factor_of(first_expert + result.topk_idx) * dispatched.weights
        return (factors.sum(1, keepdim=True) * rows).bfloat16()
    assert result.expert_offsets is not None
    y = torch.zeros_like(rows).flatten(0, -2)
    for expert, start in enumerate(result.expert_offsets[:-1].tolist()):
        size = int(result.rows_per_expert[expert])
        factor = factor_of(torch.tensor(first_expert + expert, device=rows.device))
        y[start : start + size] = factor * rows.flatten(0, -2)[start : start + size]
    return y.view_as(rows)


def run_exactly(group: dist.ProcessGroup, backend: str, topology: str, layout: str, formats: str) -> tuple[Tensor, ...]:
    row_format, grad_format = FORMATS[formats]
    device = device_of(backend)
    with make_buffer(group, backend, topology, layout) as buffer:
        inputs = exact_inputs(buffer.rank, buffer.num_experts)
        x = inputs.x.bfloat16().to(device).requires_grad_()
        weights = inputs.topk_weights.to(device, copy=True).requires_grad_()
        poison(buffer)
        dispatched = moe.dispatch(buffer, x, inputs.topk_idx.to(device), weights, row_format=row_format)
        assert dispatched.rows.isfinite().all()
        y = moe.combine(buffer, multiply_rows(buffer, dispatched), dispatched, grad_format=grad_format)
        y.backward(inputs.grad.bfloat16().to(device))  # type: ignore[no-untyped-call]
        assert x.grad is not None and weights.grad is not None
        return y.detach().float().cpu(), x.grad.float().cpu(), weights.grad.cpu()


PLACES = [("cpu", topology) for topology in ("1x1", "2x4", "8x1", "2x3")]
PLACES += [(backend, topology) for backend in ("emulated", "cuda") for topology in ("1x1", "1x3", "1x4")]


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("layout", BUFFERS)
@pytest.mark.parametrize(("backend", "topology"), [pytest.param(*each, marks=MARKS[each[0]]) for each in PLACES])
def test_functions_are_exact(
    pools: Callable[[int], Pool], backend: str, topology: str, layout: str, formats: str
) -> None:
    ranks = num_ranks(topology)
    for rank, got in enumerate(pools(ranks).run(run_exactly, backend, topology, layout, formats)):
        expected = expected_exactly(exact_inputs(rank, ranks * LOCAL_EXPERTS))
        for name, mine, theirs in zip(("y", "grad x", "grad weights"), got, expected, strict=True):
            assert torch.equal(mine, theirs), (rank, name)
