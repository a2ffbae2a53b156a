"""The load of experts and nodes, and the bias that evens it out."""

from __future__ import annotations

import torch
from data import generator
from generators import divisors
from hypothesis import given
from hypothesis import strategies as st

from deep_a2a import routing
from deep_a2a.routing import Gate, Router


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
