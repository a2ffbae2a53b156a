"""The room for rows between nodes: what it may be, how many rounds follow, and how long they read the input."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import data
import exchange
import pytest
import torch.distributed as dist
from backends import device_of, on_usual_nodes, place
from generators import Case, case_on
from pool import Pool
from small import SMALL, error_of

import deep_a2a
from deep_a2a.memory import table_of
from deep_a2a.settings import Settings

# SMALL's rows between nodes: payload, room for scales, route entries.
ROW_BYTES = 2 * 16 + 128 + 2 * 16


@pytest.mark.parametrize(
    ("num_tokens", "staging_rows", "num_rounds", "tokens_per_round"),
    [
        (9, None, 1, 9),
        (9, 18, 1, 9),
        (9, 17, 3, 4),  # rows in and out of two rounds
        (9, 4, 9, 1),
        (1000, 16, 250, 4),
        (1020, 16, 255, 4),
        (20000, 39999, 5, 4095),
        (2**20 - 2**8, 2**20, 256, 4095),
    ],
)
@pytest.mark.parametrize("num_nodes", [2, 5])
def test_staging(
    num_tokens: int, staging_rows: int | None, num_rounds: int, tokens_per_round: int, num_nodes: int
) -> None:
    """As many tokens in a round as there is room for, in and out, and no more."""
    staging_bytes = None if staging_rows is None else staging_rows * (num_nodes - 1) * ROW_BYTES
    settings = Settings(
        num_ranks=2 * num_nodes,
        ranks_per_node=2,
        hidden=16,
        num_experts=20,
        num_topk=2,
        num_max_tokens_per_rank=num_tokens,
        max_recv_rows=10,
        staging_bytes=staging_bytes,
    )
    shape = settings.shape()
    assert (shape.num_rounds, shape.tokens_per_round) == (num_rounds, tokens_per_round)
    sizes = {region.name: region.bytes_each for region in table_of(shape).regions}
    staged_tokens = num_tokens if num_rounds == 1 else 2 * tokens_per_round
    assert sizes["net_in"] == sizes["net_out"] == (num_nodes - 1) * staged_tokens * ROW_BYTES
    assert staging_bytes is None or sizes["net_in"] + sizes["net_out"] <= staging_bytes


@pytest.mark.parametrize(
    ("staging_bytes", "num_tokens", "error", "message"),
    [
        (0, 4, ValueError, "staging_bytes must be at least 1 or None, got 0"),
        (-5, 4, ValueError, "staging_bytes must be at least 1 or None, got -5"),
        (2**63, 4, ValueError, f"staging_bytes must fit 64 bits, got {2**63}"),
        (1.5, 4, TypeError, "staging_bytes must be an int, got 1.5 of type float"),
        (True, 4, TypeError, "staging_bytes must be an int, got True of type bool"),
        (767, 4, ValueError, "staging_bytes must be at least 768 for 4 tokens to 1 other nodes .*, got 767"),
        (1535, 257, ValueError, "staging_bytes must be at least 1536 for 257 tokens to 1 .* 256 rounds, got 1535"),
        # A round has at most 4095 tokens, so that is too little for so many; then all have to fit at once.
        (10**8, 2**20, ValueError, f"staging_bytes must be at least {2**20 * 384} for {2**20} .*, got 100000000"),
    ],
)
def test_bad_staging(staging_bytes: Any, num_tokens: int, error: type[Exception], message: str) -> None:
    settings = {**SMALL, "num_max_tokens_per_rank": num_tokens, "max_recv_rows": 10}
    del settings["timeout_s"]
    with pytest.raises(error, match=message):
        deep_a2a.memory_table(num_ranks=4, ranks_per_node=2, staging_bytes=staging_bytes, **settings)


def test_one_node_stages_nothing() -> None:
    settings = {key: value for key, value in SMALL.items() if key != "timeout_s"}
    table = deep_a2a.memory_table(num_ranks=4, staging_bytes=1, **settings)
    assert table == deep_a2a.memory_table(num_ranks=4, **settings)
    assert [region.bytes_each for region in table.regions if region.name in ("net_in", "net_out")] == [0, 0]


def construct_with_too_little(group: dist.ProcessGroup, backend: str) -> tuple[str, str]:
    return error_of(lambda: deep_a2a.Buffer(group, staging_bytes=767, **place(backend, 2), **SMALL))


@pytest.mark.parametrize("backend", ["cpu", "emulated"])
def test_too_little_staging(pools: Callable[[int], Pool], backend: str) -> None:
    for name, text in pools(4).run(construct_with_too_little, backend):
        assert name == "ValueError" and "staging_bytes must be at least 768" in text, (name, text)


def watch_sent(group: dist.ProcessGroup, case: Case) -> list[bool]:
    """What ``sent()`` says before the receive half, if it has to become true at all, and behind it; also if refused."""
    said = []
    with exchange.make_buffer(group, case) as buffer:
        inputs = data.inputs(case, buffer.rank)
        device = device_of(case.backend)
        x, idx = inputs.x.to(device), inputs.topk_idx.to(device)
        for bad in (False, True):
            if bad:
                idx = idx.clone()
                idx[-1:, 0] = buffer.num_experts
            pending = buffer.dispatch_send(x, idx)
            said.append(becomes_true(pending.sent, 0.2 if case.staging_tokens else 20.0))
            if bad:
                assert error_of(pending.recv)[0] == "ValueError"
            else:
                pending.recv().release()
            said.append(becomes_true(pending.sent, 20.0))
    return said


def becomes_true(call: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not call() and time.monotonic() < deadline:
        time.sleep(0.001)
    return call()


@on_usual_nodes
@pytest.mark.parametrize("staging_tokens", [None, 2])
def test_input_is_read_until_sent(
    pools: Callable[[int], Pool], backend: str, topology: str, staging_tokens: int | None
) -> None:
    """With many rounds the receive half reads it too."""
    case = case_on(backend, topology=topology, staging_tokens=staging_tokens, tokens=(8,) * 8)
    first = staging_tokens is None or case.num_ranks == case.ranks_per_node
    for said in pools(case.num_ranks).run(watch_sent, case):
        assert said == [first, True, first, True]
