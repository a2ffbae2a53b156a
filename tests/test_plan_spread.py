"""How many ranks and nodes a token goes to: enumerated, by the formula, and drawn with the repository's routing."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deep_a2a.planner.sampled import sampled_spread
from deep_a2a.planner.spread import Spread, exact_spread, find_spread, mean_groups_and_ranks
from deep_a2a.planner.workload import Workload
from deep_a2a.routing import nodes_per_token, synthetic

V3 = Workload()


def enumerate_draws(num_experts: int, num_topk: int, num_groups: int, num_ranks: int, kept: int) -> tuple[float, float]:
    """By the definition: of every order of the experts, the first `num_topk` of the first `kept` groups in it."""
    groups = ranks = orders = 0
    for order in itertools.permutations(range(num_experts)):
        keeps = list(dict.fromkeys(expert * num_groups // num_experts for expert in order))[:kept]
        chosen = [expert for expert in order if expert * num_groups // num_experts in keeps][:num_topk]
        groups += len({expert * num_groups // num_experts for expert in chosen})
        ranks += len({expert * num_ranks // num_experts for expert in chosen})
        orders += 1
    return groups / orders, ranks / orders


@pytest.mark.parametrize(
    ("experts", "topk", "groups", "ranks", "kept"),
    [
        (8, 3, 2, 4, 2),
        (8, 3, 2, 4, 1),
        (8, 4, 4, 4, 2),
        (6, 3, 3, 6, 2),
        (8, 2, 1, 4, 1),
        (8, 4, 4, 8, 3),
        (6, 6, 2, 2, 2),
    ],
)
def test_all_draws(experts: int, topk: int, groups: int, ranks: int, kept: int) -> None:
    found = mean_groups_and_ranks(experts, topk, groups, ranks, kept)
    assert found == pytest.approx(enumerate_draws(experts, topk, groups, ranks, kept), rel=1e-12)


@given(local_experts=st.integers(1, 9), locals_=st.integers(1, 8), nodes=st.integers(1, 40), topk=st.integers(1, 32))
def test_without_a_limit_it_is_the_hypergeometric_mean(local_experts: int, locals_: int, nodes: int, topk: int) -> None:
    ranks = locals_ * nodes
    experts = local_experts * ranks
    topk = min(topk, experts)
    for places, found in zip((nodes, ranks), mean_groups_and_ranks(experts, topk, nodes, ranks, nodes), strict=True):
        missed = math.comb(experts - experts // places, topk) / math.comb(experts, topk)
        assert found == pytest.approx(places * (1 - missed), rel=1e-9)


@pytest.mark.parametrize("topk_groups", [None, 4, 1])
def test_benchmark_routing(topk_groups: int | None) -> None:
    """What `synthetic` draws, counted by `nodes_per_token`, which knows nothing of the planner."""
    spread = exact_spread(Workload(topk_groups=topk_groups))
    groups = None if topk_groups is None else V3.num_nodes
    idx, _ = synthetic("uniform", 20000, 256, 8, 64, seed=3, num_groups=groups, topk_groups=topk_groups)
    for places, mean in ((64, spread.ranks_per_token), (8, spread.nodes_per_token)):
        counts = nodes_per_token(idx, 256, places).double()
        assert abs(float(counts.mean()) - mean) <= 5 * float(counts.std()) / math.sqrt(len(counts)) + 1e-12
    assert sum(spread.rank_slots) == pytest.approx(8) and spread.busiest_rank == pytest.approx(1)


def test_gate() -> None:
    """DeepSeek-V3's rule written again: groups by the sum of their two best scores."""
    workload = Workload(num_ranks=16, ranks_per_node=4, num_experts=64, num_topk=6, routing="gate", topk_groups=2)
    spread = find_spread(workload)
    rng = np.random.default_rng(5)
    ranks, nodes = [], []
    for scores in rng.random((4000, 4, 16)):
        best = np.sort(scores, axis=1)[:, -2:].sum(axis=1).argsort()[-2:]
        scores[[group for group in range(4) if group not in best]] = -1
        chosen = scores.flatten().argsort()[-6:]
        ranks.append(len(set(chosen // 4)))
        nodes.append(len(set(chosen // 16)))
    assert spread.ranks_per_token == pytest.approx(np.mean(ranks), abs=5 * np.std(ranks) / 4000**0.5)
    assert spread.nodes_per_token == pytest.approx(np.mean(nodes), abs=5 * np.std(nodes) / 4000**0.5)
    assert "seed 0" in spread.method and len(set(spread.rank_hits)) == 1, "experts are alike, and so are ranks"


def test_zipf() -> None:
    """Two of eight experts: their probabilities by hand, in the order of popularity that `synthetic` documents."""
    workload = Workload(num_ranks=4, ranks_per_node=2, num_experts=8, num_topk=2, routing="zipf")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    weights = [1 / (place + 1) for place in order]
    ranks: dict[int, float] = defaultdict(float)
    slots: dict[int, float] = defaultdict(float)
    nodes: dict[int, float] = defaultdict(float)
    for first, second in itertools.permutations(range(8), 2):
        chance = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
        for rank in (first // 2, second // 2):
            slots[rank] += chance
        for rank in {first // 2, second // 2}:
            ranks[rank] += chance
        for node in {first // 4, second // 4}:
            nodes[node] += chance
    spread = find_spread(workload)
    drawn = int(spread.method.split()[1])
    for found, expected in ((spread.rank_hits, ranks), (spread.rank_slots, slots), (spread.node_hits, nodes)):
        assert list(found) == pytest.approx([expected[place] for place in range(len(found))], abs=5 / drawn**0.5)
    assert spread.busiest_rank == pytest.approx(max(ranks.values()) * 4 / sum(ranks.values()), rel=0.01)


def test_sampled_as_exact() -> None:
    """Groups of which several are a node have no closed form here; groups that are nodes have both."""
    workload = Workload(num_ranks=16, topk_groups=1)
    sampled, exact = sampled_spread(workload), exact_spread(workload)
    assert sampled.ranks_per_token == pytest.approx(exact.ranks_per_token, rel=0.005)
    assert sampled.nodes_per_token == pytest.approx(1) and exact.nodes_per_token == pytest.approx(1)
    two_a_node = find_spread(Workload(num_ranks=16, num_groups=4, topk_groups=2))
    assert two_a_node.method.startswith("sampled") and 1 < two_a_node.nodes_per_token < 2


def test_busiest_rank() -> None:
    spread = Spread((0.9, 0.3, 0.3, 0.3), (0.9, 0.5), (1.0, 0.4, 0.3, 0.3), "by hand")
    assert spread.ranks_per_token == pytest.approx(1.8) and spread.nodes_per_token == pytest.approx(1.4)
    assert spread.busiest_rank == pytest.approx(2.0)
