"""Any case against the oracle, and results that do not depend on who comes when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
from backends import on_usual_nodes, on_usual_nodes_of_devices
from checks import check
from exchange import run_cases
from generators import LAYOUTS, Case, case_on, cases, rounds
from pool import Pool, dumps


@hypothesis.given(case=cases("cpu"))
@hypothesis.settings(max_examples=150)
def test_any_case(pools: Callable[[int], Pool], case: Case) -> None:
    check(pools(case.num_ranks), [case])


@hypothesis.given(case=cases("emulated"))
@hypothesis.settings(max_examples=100)
def test_any_case_emulated(pools: Callable[[int], Pool], case: Case) -> None:
    check(pools(case.num_ranks), [case])


@pytest.mark.gpu
@hypothesis.given(case=cases("cuda"))
@hypothesis.settings(max_examples=100)
def test_any_case_cuda(pools: Callable[[int], Pool], case: Case) -> None:
    check(pools(case.num_ranks), [case])


def turns_of(pool: Pool, cases: list[Case]) -> bytes:
    return dumps(pool.run(run_cases, cases))


@pytest.mark.parametrize(
    ("backend", "topology", "num_seeds"),
    [("cpu", "2x4", 8), ("cpu", "8x1", 8), ("emulated", "2x2", 3), ("emulated", "4x1", 3)],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_delivery_order_does_not_show(
    pools: Callable[[int], Pool], backend: str, topology: str, num_seeds: int, layout: str
) -> None:
    """Network puts late, in pieces and overtaking each other: the same bits, by every seed, as without disturbance."""
    modes: dict[str, Any] = {"zero_padding": True, "cached": True, "side": True, "local_experts": 1, "num_topk": 3}
    if layout == "rank":  # long rows, so that a stream has several chunks
        modes |= {"hidden": 7168, "max_tokens": 20, "tokens": (20, 3, 0, 17, 8, 20, 1, 9)}
    calm = [case_on(backend, topology=topology, layout=layout, seed=seed, **modes) for seed in range(2)]
    pool = pools(calm[0].num_ranks)
    check(pool, calm)
    expected = turns_of(pool, calm)
    for network_seed in range(num_seeds):
        assert turns_of(pool, [replace(case, network_seed=network_seed) for case in calm]) == expected


@on_usual_nodes_of_devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_delays_do_not_show(pools: Callable[[int], Pool], backend: str, topology: str, layout: str) -> None:
    """Kernels that wait for a while before they release a flag: the same bits, by every seed, as without delays."""
    modes: dict[str, Any] = {"zero_padding": True, "cached": True, "side": True, "num_topk": 3, "num_lanes": 2}
    calm = [case_on(backend, topology=topology, layout=layout, seed=seed, **modes) for seed in range(2)]
    pool = pools(calm[0].num_ranks)
    check(pool, calm)
    expected = turns_of(pool, calm)
    for network_seed in range(4 if backend == "emulated" else 16):
        assert turns_of(pool, [replace(case, network_seed=network_seed) for case in calm]) == expected


@pytest.mark.parametrize("topology", ["1x2", "2x1"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_schedules_do_not_show(fresh_pool: Callable[..., Pool], layout: str, topology: str) -> None:
    """The emulator runs warps and bulk copies in another order by each seed; several numbers of blocks as well."""
    modes: dict[str, Any] = {"zero_padding": True, "cached": True, "side": True}
    expected = b""
    for seed in (1, 2, 3):
        pool = fresh_pool(2, DEEP_A2A_EMULATOR_SEED=str(seed))
        for num_sms in (1, 2, 3, 5):
            same = [case_on("emulated", topology=topology, layout=layout, num_sms=num_sms, seed=1, **modes)]
            if not expected:
                check(pool, same)
                expected = turns_of(pool, same)
            assert turns_of(pool, same) == expected
        pool.close()


@on_usual_nodes
def test_two_runs_agree(pools: Callable[[int], Pool], backend: str, topology: str) -> None:
    first = [case_on(backend, topology=topology, layout=layout) for layout in LAYOUTS]
    turns = [replace(case, zero_padding=True) for each in first for case in rounds(each, 10, 7)]
    pool = pools(first[0].num_ranks)
    assert turns_of(pool, turns) == turns_of(pool, turns)


@on_usual_nodes_of_devices
def test_backends_agree(pools: Callable[[int], Pool], backend: str, topology: str) -> None:
    """With the oracle out of the way: what the CPU backend gives, bit by bit, with any input."""
    first = [case_on(backend, topology=topology, layout=layout) for layout in LAYOUTS]
    turns = [replace(case, zero_padding=True) for each in first for case in rounds(each, 8, 11)]
    on_cpu = [replace(case, backend="cpu", num_sms=None) for case in turns]
    pool = pools(first[0].num_ranks)
    assert turns_of(pool, turns) == turns_of(pool, on_cpu)
