"""The gate against two other implementations, its balancing, and the made-up routings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from deep_a2a import routing
from deep_a2a.routing import Gate, Router, node_limited_topk, synthetic


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Weights by expert, -1 for those not chosen: the same for equal sets in any order."""
    return torch.full((len(topk_idx), num_experts), -1.0).scatter(1, topk_idx, topk_weights)


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


# ---- the gate --------------------------------------------------------------------------------------------------


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


# ---- balance ---------------------------------------------------------------------------------------------------


def test_bias_moves_against_the_load_by_one_step() -> None:
    bias = torch.tensor([0.5, 0.0, 0.0, -0.25])
    routing.update_bias(bias, torch.tensor([9, 4, 3, 0], dtype=torch.int32), 0.125)
    assert bias.tolist() == [0.375, 0.0, 0.125, -0.125]
    large = 2**40
    bias = torch.zeros(3)
    routing.update_bias(bias, torch.tensor([large + 1, large, large - 1]), 1.0)  # the mean is not one of float32
    assert bias.tolist() == [-1.0, 0.0, 1.0]


def test_updates_even_out_a_skewed_gate() -> None:
    router = Router(num_experts=32, num_topk=4, num_groups=4, topk_groups=2)
    gate = Gate(16, router)
    random = generator(5)
    with torch.no_grad():
        gate.weight.normal_(std=0.25, generator=random)
        gate.weight[:, 0] += torch.linspace(-1, 1, 32)
    balance = []
    for _ in range(300):
        x = torch.randn(256, 16, generator=random)
        x[:, 0] = 1.0  # the same pull of every token to the experts at the end
        load = routing.expert_load(gate(x)[0], 32)
        balance.append(routing.load_balance(load))
        gate.update_bias(load, 0.01)
    assert balance[0] > 3 and sum(balance[-20:]) / 20 < 1.5


@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_load_and_nodes_are_those_counted_by_hand(
    num_experts: int, num_tokens: int, num_topk: int, seed: int, int32: bool
) -> None:
    topk_idx = torch.randint(-1, num_experts, (num_tokens, num_topk), generator=generator(seed))
    if int32:
        topk_idx = topk_idx.int()
    rows = [[expert for expert in row if expert >= 0] for row in topk_idx.tolist()]
    load = routing.expert_load(topk_idx, num_experts)
    assert load.dtype == torch.int64
    assert load.tolist() == [sum(row.count(expert) for row in rows) for expert in range(num_experts)]
    for num_nodes in divisors(num_experts):
        size = num_experts // num_nodes
        expected = [len({expert // size for expert in row}) for row in rows]
        assert routing.nodes_per_token(topk_idx, num_experts, num_nodes).tolist() == expected


def test_load_balance_is_the_largest_over_the_mean() -> None:
    assert routing.load_balance(torch.tensor([2, 2, 2])) == 1.0
    assert routing.load_balance(torch.tensor([0, 0, 6, 0], dtype=torch.int32)) == 4.0
    assert routing.load_balance(torch.tensor([1.0, 3.0])) == 1.5
    assert routing.load_balance(torch.zeros(5, dtype=torch.int64)) == 1.0


def test_groups_for_nodes() -> None:
    assert routing.groups_for_nodes(8, 256) == 8
    assert routing.groups_for_nodes(2, 256, at_least=8) == 8
    assert routing.groups_for_nodes(16, 256, at_least=8) == 16
    assert routing.groups_for_nodes(3, 36, at_least=4) == 6
    assert routing.groups_for_nodes(2, 18, at_least=4) == 6  # 4 is no divisor of 18
    assert routing.groups_for_nodes(1, 7, at_least=2) == 7


# ---- synthetic -------------------------------------------------------------------------------------------------


@st.composite
def synthetic_arguments(draw: st.DrawFn) -> dict[str, Any]:
    num_ranks = draw(st.integers(1, 6))
    num_experts = num_ranks * draw(st.integers(1, 6))
    arguments: dict[str, Any] = {
        "kind": draw(st.sampled_from(routing.KINDS)),
        "num_tokens": draw(st.integers(0, 20)),
        "num_experts": num_experts,
        "num_ranks": num_ranks,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "exponent": draw(st.sampled_from([0.0, 0.5, 1.2, 1000.0])),
        "hot_expert": draw(st.integers(0, num_experts - 1)),
        "target_rank": draw(st.integers(0, num_ranks - 1)),
    }
    most = num_experts
    if draw(st.booleans()):
        num_groups = draw(st.sampled_from(divisors(num_experts)))
        topk_groups = draw(st.integers(1, num_groups))
        arguments |= {"num_groups": num_groups, "topk_groups": topk_groups}
        most = topk_groups * (num_experts // num_groups)
    arguments["num_topk"] = draw(st.integers(1, most))
    return arguments


@given(synthetic_arguments())
def test_synthetic_routings_keep_their_promise(arguments: dict[str, Any]) -> None:
    kind, num_experts, num_topk = arguments["kind"], arguments["num_experts"], arguments["num_topk"]
    topk_idx, topk_weights = synthetic(**arguments)
    again_idx, again_weights = synthetic(**arguments)
    assert torch.equal(topk_idx, again_idx) and torch.equal(topk_weights, again_weights)
    assert topk_idx.dtype == torch.int64 and topk_weights.dtype == torch.float32
    assert topk_idx.shape == topk_weights.shape == (arguments["num_tokens"], num_topk)

    local = num_experts // arguments["num_ranks"]
    target = set(range(arguments["target_rank"] * local, (arguments["target_rank"] + 1) * local))
    eligible = set(range(num_experts))
    eligible = {"all_to_one_rank": target, "none_to_rank": eligible - target}.get(kind, eligible)
    num_groups = arguments.get("num_groups", 1)
    topk_groups, group_size = arguments.get("topk_groups", 1), num_experts // num_groups
    for idx, weights in zip(topk_idx.tolist(), topk_weights.tolist(), strict=True):
        chosen = [expert for expert in idx if expert != -1]
        assert len(set(chosen)) == len(chosen) and set(chosen) <= eligible
        groups = {expert // group_size for expert in chosen}
        assert len(groups) <= topk_groups
        if len(chosen) < num_topk:  # nothing eligible may be left, neither in a kept group nor a group to add
            left = {expert for expert in eligible - set(chosen) if expert // group_size in groups}
            assert not left
            assert len(groups) == topk_groups or eligible == set(chosen)
        assert kind != "hot" or arguments["hot_expert"] in chosen
        assert [weight > 0 for weight in weights] == [expert != -1 for expert in idx]
        assert sum(weights) == pytest.approx(1.0 if chosen else 0.0, abs=1e-5)


@pytest.mark.parametrize("kind", routing.KINDS)
def test_seeds_and_generators(kind: str) -> None:
    def draw(seed: int | torch.Generator) -> list[Any]:
        topk_idx, topk_weights = synthetic(kind, 64, 32, 4, 4, seed=seed)
        return [topk_idx.tolist(), topk_weights.tolist()]

    going_on = generator(3)
    first, second = draw(going_on), draw(going_on)
    assert first == draw(3) and first[0] != second[0] and first[0] != draw(4)[0]


def test_uniform_and_zipf_have_their_frequencies() -> None:
    """The first slot is one draw by popularity: its counts are within five standard deviations of the expected."""
    num_tokens = 20000
    for kind, exponent in (("uniform", 1.0), ("zipf", 1.0), ("zipf", 0.5), ("zipf", 0.0)):
        topk_idx, _ = synthetic(kind, num_tokens, 16, 3, 4, exponent=exponent, seed=11)
        counts = torch.bincount(topk_idx[:, 0], minlength=16).double()
        popularity = torch.arange(1, 17).double() ** -(exponent if kind == "zipf" else 0.0)
        expected = popularity / popularity.sum() * num_tokens
        if popularity[0] != popularity[1]:
            counts = counts.sort(descending=True).values
        assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def test_zipf_ranks_agree_on_what_is_popular() -> None:
    def most_popular(seed: int, popularity_seed: int) -> int:
        topk_idx, _ = synthetic("zipf", 500, 64, 2, 8, exponent=2.0, seed=seed, popularity_seed=popularity_seed)
        return int(routing.expert_load(topk_idx, 64).argmax())

    assert len({most_popular(seed, 0) for seed in range(5)}) == 1
    assert len({most_popular(0, popularity_seed) for popularity_seed in range(5)}) > 1


def test_large_shape_with_a_node_limit() -> None:
    topk_idx, _ = synthetic("uniform", 8192, 256, 8, 64, num_groups=8, topk_groups=4)
    num_nodes = routing.nodes_per_token(topk_idx, 256, 8)
    assert num_nodes.max() == 4 and routing.load_balance(routing.expert_load(topk_idx, 256)) < 1.5
    without, _ = synthetic("uniform", 8192, 256, 8, 64)
    assert routing.nodes_per_token(without, 256, 8).double().mean() > 5


# ---- bad arguments ---------------------------------------------------------------------------------------------

IDX = torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Router(num_experts=0), ValueError, "num_experts is 0, expected at least 1"),
        (lambda: Router(num_experts=2.0), TypeError, "num_experts is 2.0 of type float, expected an int"),  # type: ignore[arg-type]
        (lambda: Router(num_groups=7), ValueError, "num_groups is 7, expected a divisor of num_experts = 256"),
        (lambda: Router(topk_groups=9), ValueError, "topk_groups is 9, expected 1 to 8"),
        (lambda: Router(num_topk=0), ValueError, "num_topk is 0, expected at least 1"),
        (
            lambda: Router(num_topk=33, topk_groups=1),
            ValueError,
            "num_topk is 33, expected at most 32: topk_groups = 1",
        ),
        (lambda: Router(scaling_factor=float("nan")), ValueError, "scaling_factor is nan, expected"),
        (lambda: Router().max_nodes_per_token(3), ValueError, "num_nodes is 3, expected a divisor of num_groups = 8"),
        (lambda: node_limited_topk(torch.zeros(2, 256).half(), Router()), TypeError, "scores has dtype torch.float16"),
        (lambda: node_limited_topk(torch.zeros(2, 8), Router()), ValueError, r"scores has shape \(2, 8\), expected"),
        (lambda: node_limited_topk(torch.zeros(2, 256), Router(), torch.zeros(8)), ValueError, "bias is torch.float32"),
        (lambda: Gate(0, Router()), ValueError, "hidden is 0, expected at least 1"),
        (lambda: Gate(4, Router())(torch.zeros(2, 5)), ValueError, r"x has shape \(2, 5\), expected \[tokens, 4\]"),
        (lambda: routing.groups_for_nodes(3, 8), ValueError, "num_nodes is 3, expected a divisor of num_experts = 8"),
        (lambda: routing.groups_for_nodes(2, 8, at_least=9), ValueError, "at_least is 9, expected 1 to 8"),
        (lambda: routing.nodes_per_token(IDX, 8, 3), ValueError, "num_nodes is 3, expected a divisor of num_experts"),
        (lambda: routing.nodes_per_token(IDX[0], 8, 2), ValueError, r"topk_idx has shape \(2,\), expected"),
        (lambda: routing.expert_load(IDX + 8, 8), ValueError, "topk_idx has values from 8 to 8, expected -1 to 7"),
        (lambda: routing.expert_load(IDX - 2, 8), ValueError, "topk_idx has values from -2 to -2, expected -1 to 7"),
        (lambda: routing.expert_load(IDX.float(), 8), TypeError, "topk_idx has dtype torch.float32, expected"),
        (lambda: routing.load_balance(torch.zeros(0)), ValueError, r"load has shape \(0,\), expected"),
        (lambda: routing.update_bias(torch.zeros(2).half(), IDX[0], 1.0), TypeError, "bias has dtype torch.float16"),
        (lambda: routing.update_bias(torch.zeros(2), torch.zeros(2), 1.0), TypeError, "load has dtype torch.float32"),
        (lambda: routing.update_bias(torch.zeros(3), IDX[0], 1.0), ValueError, r"load has shape \(2,\), bias \(3,\)"),
        (lambda: routing.update_bias(torch.zeros(2), IDX[0], -1.0), ValueError, "speed is -1.0, expected"),
        (lambda: synthetic("hottest", 1, 8, 2, 2), ValueError, "kind is 'hottest', expected one of 'uniform'"),
        (lambda: synthetic("uniform", -1, 8, 2, 2), ValueError, "num_tokens is -1, expected at least 0"),
        (lambda: synthetic("uniform", 1, 8, 9, 2), ValueError, "num_topk is 9, expected 1 to 8"),
        (lambda: synthetic("uniform", 1, 8, 2, 3), ValueError, "num_ranks is 3, expected a divisor of num_experts = 8"),
        (lambda: synthetic("uniform", 1, 8, 2, 2, seed=-1), ValueError, "seed is -1, expected at least 0"),
        (lambda: synthetic("zipf", 1, 8, 2, 2, exponent=-1.0), ValueError, "exponent is -1.0, expected"),
        (lambda: synthetic("zipf", 1, 8, 2, 2, popularity_seed=-1), ValueError, "popularity_seed is -1, expected"),
        (lambda: synthetic("hot", 1, 8, 2, 2, hot_expert=8), ValueError, "hot_expert is 8, expected 0 to 7"),
        (lambda: synthetic("none_to_rank", 1, 8, 2, 2, target_rank=2), ValueError, "target_rank is 2, expected 0 to 1"),
        (
            lambda: synthetic("uniform", 1, 8, 2, 2, num_groups=2),
            ValueError,
            "num_groups is 2 and topk_groups is None, expected both or neither",
        ),
        (
            lambda: synthetic("uniform", 1, 8, 5, 2, num_groups=2, topk_groups=1),
            ValueError,
            "num_topk is 5, expected 1 to 4",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
