"""Bad arguments of the gate, its balancing and the made-up routings are named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deep_a2a import routing
from deep_a2a.routing import Gate, Router, node_limited_topk, synthetic

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
