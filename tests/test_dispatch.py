"""Dispatch, and the combine that undoes it, against the oracle: one case per thing that broke others' packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import NODES, on_several_nodes, on_topologies, on_usual_nodes, several
from checks import check
from generators import LAYOUTS, PAYLOADS, ROUTINGS, Case, case_on
from pool import Pool

FEW_EXPERTS: dict[str, Any] = {"local_experts": 1, "num_topk": 2, "expert_capacity": 40}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no tokens anywhere": {"tokens": (0,) * 8},
    "tokens on one rank": {"tokens": (0, 0, 0, 0, 0, 5, 0, 0)},
    "full": {"tokens": (8,) * 8},
    "one token": {"max_tokens": 1, "tokens": (1,) * 8},
    "many tokens": {"max_tokens": 150, "tokens": (150, 149, 0, 1, 77, 150, 33, 2), "hidden": 8},
    "several chunks": {"max_tokens": 25, "tokens": (25, 24, 0, 1, 25, 7, 19, 2), "hidden": 7168, **FEW_EXPERTS},
    **{f"routing {routing}": {"routing": routing} for routing in ROUTINGS},
    **{f"hidden {hidden}": {"hidden": hidden} for hidden in (8, 16, 136, 1000, 1024, 7168)},
    **{f"hidden {hidden} FP8": {"hidden": hidden, "payload": "cast fp8_e4m3:float32"} for hidden in (16, 144, 1024)},
    **{payload: {"payload": payload, "hidden": 272} for payload in PAYLOADS},
    "topk 1": {"num_topk": 1},
    "topk 9": {"num_topk": 9},
    "topk 32": {"num_topk": 32, "local_experts": 8, "routing": "sparse"},
    "topk 32, all": {"num_topk": 32, "local_experts": 8},
    "one expert per rank": {"local_experts": 1},
    "520 experts": {"local_experts": 65, "num_topk": 9},
    "1024 experts": {"local_experts": 128, "num_topk": 8},
    "int32 idx": {"idx_dtype": torch.int32},
    "int32 idx with -1": {"idx_dtype": torch.int32, "routing": "sparse"},
    "weights default to ones": {"default_weights": True},
    "owned": {"output": "owned"},
    "owned FP8": {"output": "owned", "payload": "cast fp8_e4m3:ue8m0", "hidden": 272},
    "fixed shapes": {"host_sync": False},
    "fixed shapes, owned": {"host_sync": False, "output": "owned"},
    "fixed shapes, cached": {"host_sync": False, "cached": True},
    "zero padding": {"zero_padding": True, "expert_alignment": 8},
    "zero padding FP8": {"zero_padding": True, "expert_alignment": 8, "payload": "cast fp8_e5m2:float32"},
    "column-major": {"column_major": True, "payload": "cast fp8_e4m3:float32", "hidden": 272},
    "column-major, ue8m0": {"column_major": True, "payload": "fp8_e5m2:ue8m0", "hidden": 1040, "cached": True},
    "alignment 128": {"expert_alignment": 128},
    "alignment 5": {"expert_alignment": 5},
    "lent": {"lent": True},
    "lent FP8": {"lent": True, "payload": "fp8_e4m3:float32"},
    "FP8, 16 bytes of scales at a time": {"payload": "fp8_e4m3:float32", "hidden": 1024},
    "FP8, rows in pieces": {"payload": "fp8_e4m3:float32", "hidden": 7184, "max_tokens": 3, "tokens": (3, 2, 0, 1) * 2},
    "strided": {"strided": True, "hidden": 24},
    "strided FP8": {"strided": True, "payload": "fp8_e4m3:float32", "hidden": 144},
    "strided FP8, 16 bytes": {"strided": True, "payload": "fp8_e4m3:float32", "hidden": 512},
    "strided FP8, ue8m0": {"strided": True, "payload": "fp8_e4m3:ue8m0", "hidden": 144},
    "halves": {"halves": True},
    "async": {"async_op": True},
    "cached": {"cached": True},
    "cached FP8": {"cached": True, "payload": "cast fp8_e4m3:float32"},
    "cached, sparse": {"cached": True, "routing": "sparse"},
    "one slot": {"num_slots": 1, "cached": True},
    "all modes": dict.fromkeys(("lent", "halves", "async_op", "cached", "side", "zero_padding"), True),
}


# Tokens between nodes in 8, 4 and 3 rounds, and in 150; streams that have rows in some rounds alone.
ROUNDS: dict[str, dict[str, Any]] = {
    **{f"of {tokens}": {"staging_tokens": tokens, "cached": True, "side": True} for tokens in (1, 2, 3)},
    "no tokens anywhere": {"staging_tokens": 1, "tokens": (0,) * 8, "cached": True},
    "tokens on one rank": {"staging_tokens": 1, "tokens": (0, 0, 0, 0, 0, 8, 0, 0), "cached": True},
    "tokens on the first ranks": {"staging_tokens": 1, "tokens": (8, 8, 1, 0, 0, 0, 0, 0), "cached": True},
    "one rank has all": {"staging_tokens": 2, "routing": "one_rank", "side": True},
    "nowhere": {"staging_tokens": 1, "routing": "nowhere", "side": True},
    "sparse, disturbed": {
        "staging_tokens": 1,
        "routing": "sparse",
        "num_topk": 2,
        "network_seed": 3,
        "cached": True,
    },
    "disturbed": {"staging_tokens": 1, "tokens": (8,) * 8, "network_seed": 4, "cached": True, "side": True},
    "ranks without tokens, disturbed": {
        "staging_tokens": 1,
        "tokens": (8, 0, 8, 0, 8, 0, 0, 8),
        "network_seed": 6,
        "cached": True,
        "side": True,
    },
    "repeated": {"staging_tokens": 3, "routing": "repeated"},
    "FP8": {"staging_tokens": 2, "payload": "fp8_e5m2:ue8m0", "hidden": 272, "cached": True},
    "FP8 cast": {"staging_tokens": 2, "payload": "cast fp8_e4m3:float32", "hidden": 272, "cached": True},
    "FP8 cast, halves": {"staging_tokens": 1, "payload": "cast fp8_e4m3:ue8m0", "hidden": 272, "halves": True},
    "fixed shapes": {"staging_tokens": 1, "host_sync": False, "cached": True},
    "all modes": {
        "staging_tokens": 1,
        **dict.fromkeys(("lent", "halves", "async_op", "cached", "side", "zero_padding"), True),
    },
    "owned, strided": {"staging_tokens": 2, "output": "owned", "strided": True, "async_op": True},
    "many": {
        "staging_tokens": 1,
        "max_tokens": 150,
        "tokens": (150, 149, 0, 1, 77, 150, 33, 2),
        "hidden": 8,
        "cached": True,
    },
    "several chunks": {
        "staging_tokens": 12,
        "max_tokens": 40,
        "tokens": (40, 39, 0, 1, 40, 13, 25, 12),
        "hidden": 7168,
        "network_seed": 5,
        "cached": True,
        **FEW_EXPERTS,
        "expert_capacity": 320,
    },
}


@on_usual_nodes
@pytest.mark.parametrize("name", CASES)
def test_case(pools: Callable[[int], Pool], backend: str, topology: str, name: str) -> None:
    cases = [case_on(backend, topology=topology, **{"layout": layout, **CASES[name]}) for layout in LAYOUTS]
    check(pools(cases[0].num_ranks), cases)


@on_several_nodes
@pytest.mark.parametrize("name", ROUNDS)
def test_rounds(pools: Callable[[int], Pool], backend: str, topology: str, name: str) -> None:
    cases = [case_on(backend, topology=topology, **{"layout": layout, **ROUNDS[name]}) for layout in LAYOUTS]
    check(pools(cases[0].num_ranks), cases)


def cases_of(usual: Case) -> list[Case]:
    return [
        replace(usual, layout=layout, payload=payload, routing=routing)
        for layout in LAYOUTS
        for payload, routing in [("bf16", "uniform"), ("cast fp8_e4m3:float32", "sparse")]
    ]


@on_topologies()
def test_topology(pools: Callable[[int], Pool], backend: str, topology: str) -> None:
    usual = case_on(backend, topology=topology, cached=True)
    check(pools(usual.num_ranks), cases_of(usual))


@on_topologies({name: several(nodes) for name, nodes in NODES.items()})
def test_topology_in_rounds(pools: Callable[[int], Pool], backend: str, topology: str) -> None:
    usual = case_on(backend, topology=topology, staging_tokens=1, cached=True)
    check(pools(usual.num_ranks), cases_of(usual))


@on_usual_nodes
def test_tight_capacity(pools: Callable[[int], Pool], backend: str, topology: str) -> None:
    """Slots of exactly the rows that arrive, where a wrong base would show."""
    full = case_on(backend, topology=topology, tokens=(8,) * 8, routing="one_expert", cached=True)
    full = replace(full, num_topk=1, local_experts=1)
    check(pools(full.num_ranks), [replace(full, layout="padded", expert_capacity=8 * full.num_ranks)])


@on_usual_nodes
@pytest.mark.parametrize("staging_tokens", [None, 2])
def test_different_cases_in_one_buffer(
    pools: Callable[[int], Pool], backend: str, topology: str, staging_tokens: int | None
) -> None:
    """What one dispatch leaves in the slots, flags and handles must not reach the next."""
    for layout in LAYOUTS:
        case = case_on(backend, topology=topology, layout=layout, staging_tokens=staging_tokens)
        turns = [replace(case, payload=payload, seed=seed) for seed, payload in enumerate(PAYLOADS)]
        turns += [replace(case, routing=routing, seed=9) for routing in ROUTINGS if routing != "repeated"]
        turns += [replace(case, tokens=tokens, seed=10) for tokens in [(0,) * 8, (8,) * 8, (0, 8) * 4]]
        check(pools(case.num_ranks), turns)
