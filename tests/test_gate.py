"""The gate against two other implementations, and what holds for whatever it chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data import generator
from generators import divisors
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from deep_a2a import routing
from deep_a2a.routing import Gate, Router, node_limited_topk


def dense(topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Weights by expert, -1 for those not chosen: the same for equal sets in any order."""
    return torch.full((len(topk_idx), num_experts), -1.0).scatter(1, topk_idx, topk_weights)


@pytest.mark.parametrize(
    "router",
    [
        Router(),
        Router(num_experts=64, num_topk=6, num_groups=8, topk_groups=3, scaling_factor=1.0),
        Router(num_experts=96, num_topk=12, num_groups=6, topk_groups=6, scaling_factor=16.0),
        Router(num_experts=32, num_topk=4, num_groups=1, topk_groups=1, normalize=False),
        Router(num_experts=32, num_topk=4, num_groups=16, topk_groups=2),
    ],
    ids=str,
)
def test_gate_is_that_of_transformers(router: Router) -> None:
    config = DeepseekV3Config(
        hidden_size=48,
        n_routed_experts=router.num_experts,
        num_experts_per_tok=router.num_topk,
        n_group=router.num_groups,
        topk_group=router.topk_groups,
        routed_scaling_factor=router.scaling_factor,
        norm_topk_prob=router.normalize,
    )
    theirs: Any = DeepseekV3TopkRouter(config)
    ours = Gate(48, router)
    random = generator(7)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(ours.weight.shape, generator=random) * 0.2)
        ours.expert_bias.copy_(torch.randn(ours.expert_bias.shape, generator=random) * 0.1)
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(ours.expert_bias)
    x = torch.randn(1000, 48, generator=random)
    topk_idx, topk_weights = ours(x)
    _, their_weights, their_idx = theirs(x)
    got, expected = (
        dense(idx, weights.detach(), router.num_experts)
        for idx, weights in ((topk_idx, topk_weights), (their_idx, their_weights))
    )
    assert torch.equal(got >= 0, expected >= 0)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    unbiased, _ = node_limited_topk((x @ ours.weight.T).sigmoid(), router)
    assert not torch.equal(unbiased.sort().values, topk_idx.sort().values), "the bias of this test decides nothing"


def select_slowly(scores: list[float], bias: list[float], router: Router) -> list[int]:
    """The definition, with the tie rule, by sorted lists."""
    selection = [score + b for score, b in zip(scores, bias, strict=True)]
    size = router.num_experts // router.num_groups
    groups = [range(start, start + size) for start in range(0, router.num_experts, size)]
    group_score = [sum(sorted((selection[e] for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(router.num_groups), key=lambda g: (-group_score[g], g))[: router.topk_groups]
    candidates = [expert for g in kept for expert in groups[g]]
    return sorted(candidates, key=lambda e: (-selection[e], e))[: router.num_topk]


@st.composite
def routers(draw: st.DrawFn) -> Router:
    num_groups, size = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    topk_groups = draw(st.integers(1, num_groups))
    return Router(
        num_experts=num_groups * size,
        num_topk=draw(st.integers(1, topk_groups * size)),
        num_groups=num_groups,
        topk_groups=topk_groups,
        scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        normalize=draw(st.booleans()),
    )


@given(routers(), st.integers(0, 2**32 - 1))
def test_ties_go_to_the_lower_group_and_expert(router: Router, seed: int) -> None:
    """Few different values, all sums of them exact, so that most tokens have ties, of experts and of groups."""
    scores = torch.randint(0, 4, (20, router.num_experts), generator=generator(seed)) / 4
    bias = torch.randint(-1, 2, (router.num_experts,), generator=generator(seed + 1)) / 4
    topk_idx, _ = node_limited_topk(scores, router, bias)
    assert topk_idx.tolist() == [select_slowly(row, bias.tolist(), router) for row in scores.tolist()]


@given(routers(), st.integers(0, 2**32 - 1))
def test_what_holds_for_every_token(router: Router, seed: int) -> None:
    # Few bits, so that adding a constant to all rounds nothing.
    scores = torch.randint(1, 2**16, (30, router.num_experts), generator=generator(seed)) / 2**16
    bias = torch.randn(router.num_experts, generator=generator(seed + 1))
    topk_idx, topk_weights = node_limited_topk(scores, router, bias)

    assert topk_idx.dtype == torch.int64 and topk_weights.dtype == torch.float32 and topk_idx.is_contiguous()
    assert all(len(set(row)) == router.num_topk for row in topk_idx.tolist())
    assert routing.nodes_per_token(topk_idx, router.num_experts, router.num_groups).max() <= router.topk_groups
    for num_nodes in divisors(router.num_groups):
        num_visited = routing.nodes_per_token(topk_idx, router.num_experts, num_nodes)
        assert num_visited.max() <= router.max_nodes_per_token(num_nodes)

    chosen = scores.gather(1, topk_idx).double()
    total = chosen.sum(dim=1, keepdim=True) if router.normalize else torch.ones(30, 1)
    torch.testing.assert_close(topk_weights.double(), chosen / total * router.scaling_factor, rtol=1e-6, atol=0)
    if router.normalize:
        torch.testing.assert_close(topk_weights.sum(1), torch.full((30,), router.scaling_factor), rtol=1e-6, atol=0)

    shifted_idx, shifted_weights = node_limited_topk(scores, router, torch.full_like(bias, 0.5))
    plain_idx, plain_weights = node_limited_topk(scores, router)
    assert torch.equal(shifted_idx, plain_idx) and torch.equal(shifted_weights, plain_weights)


def test_bias_of_minus_infinity_keeps_an_expert_out() -> None:
    router = Router(num_experts=16, num_topk=3, num_groups=4, topk_groups=2)
    bias = torch.zeros(16)
    bias[[0, 5, 6]] = -torch.inf
    scores = torch.rand(200, 16, generator=generator(0))
    scores[:, [0, 5, 6]] = 1.0
    topk_idx, topk_weights = node_limited_topk(scores, router, bias)
    assert not torch.isin(topk_idx, torch.tensor([0, 5, 6])).any() and topk_weights.isfinite().all()


def test_scores_of_zero_give_weights_of_zero() -> None:
    _, topk_weights = node_limited_topk(torch.zeros(2, 256), Router())
    assert torch.equal(topk_weights, torch.zeros(2, 8))


def test_gradient_of_the_scores_is_that_of_the_formula() -> None:
    router = Router(num_experts=16, num_topk=4, num_groups=4, topk_groups=2)
    scores = torch.rand(5, 16, generator=generator(1)).requires_grad_()
    bias = torch.randn(16, generator=generator(2))
    topk_idx, topk_weights = node_limited_topk(scores, router, bias)
    grad = torch.randn(5, 4, generator=generator(3))
    (got,) = torch.autograd.grad(topk_weights, scores, grad)
    # w_k = f * s_k / S, so dL/ds_k = f * (g_k - sum_j(g_j s_j) / S) / S.
    chosen = scores.detach().gather(1, topk_idx).double()
    total = chosen.sum(1, keepdim=True)
    by_slot = router.scaling_factor * (grad - (grad * chosen).sum(1, keepdim=True) / total) / total
    expected = torch.zeros(5, 16, dtype=torch.float64).scatter(1, topk_idx, by_slot)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_gate_computes_in_float32_whatever_the_model_does() -> None:
    gate = Gate(32, Router(num_experts=16, num_topk=2, num_groups=4, topk_groups=2))
    x = torch.randn(50, 32, generator=generator(4))
    plain = gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = gate(x)
    assert torch.equal(under_autocast[0], plain[0]) and torch.equal(under_autocast[1], plain[1])

    gate.expert_bias.fill_(0.1000001)
    model = torch.nn.Sequential(gate).to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16
    assert gate.expert_bias.dtype == torch.float32 and torch.equal(gate.expert_bias, torch.full((16,), 0.1000001))
    assert "0.expert_bias" in model.state_dict()
    topk_idx, topk_weights = gate(x.bfloat16())
    scores = (x.bfloat16().float() @ gate.weight.float().T).sigmoid()
    expected_idx, expected_weights = node_limited_topk(scores, gate.router, gate.expert_bias)
    assert torch.equal(topk_idx, expected_idx) and topk_weights.dtype == torch.float32
    torch.testing.assert_close(topk_weights, expected_weights)


def test_gate_without_tokens() -> None:
    topk_idx, topk_weights = Gate(32, Router())(torch.empty(0, 32))
    assert topk_idx.shape == topk_weights.shape == (0, 8)
