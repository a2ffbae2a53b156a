"""The made-up routings: what each kind promises, and that seeds decide about the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generators import divisors
from hypothesis import given
from hypothesis import strategies as st

from deep_a2a import routing
from deep_a2a.routing import synthetic


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

    going_on = torch.Generator().manual_seed(3)
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
