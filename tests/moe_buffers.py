"""Buffers that the tests of deep_a2a.moe share, and the number of tokens on each rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from backends import device_of, place

import deep_a2a

HIDDEN = 64
LOCAL_EXPERTS = 4
NUM_TOPK = 4
MAX_TOKENS = 9
TOKENS = (5, 9, 0, 1, 7, 3, 8, 2)  # by rank

BUFFERS: dict[str, dict[str, Any]] = {
    "rank": {"layout": "rank"},
    "expert": {"layout": "expert", "expert_alignment": 8},
    "padded": {"layout": "padded", "expert_capacity": 40},
}


def sizes(topology: str) -> tuple[int, int]:
    """Nodes and ranks per node of, say, "2x4"."""
    num_nodes, ranks_per_node = topology.split("x")
    return int(num_nodes), int(ranks_per_node)


def make_buffer(group: dist.ProcessGroup, backend: str, topology: str, layout: str) -> deep_a2a.Buffer:
    num_nodes, ranks_per_node = sizes(topology)
    return deep_a2a.Buffer(
        group,
        hidden=HIDDEN,
        num_experts=num_nodes * ranks_per_node * LOCAL_EXPERTS,
        num_topk=NUM_TOPK,
        num_max_tokens_per_rank=MAX_TOKENS,
        timeout_s=30.0,
        **place(backend, ranks_per_node),
        **BUFFERS[layout],
    )


def poison(buffer: deep_a2a.Buffer) -> None:
    """Leave NaN in all receive slots, for padding to be found in."""
    device = device_of(buffer.backend)
    x = torch.empty(0, HIDDEN, dtype=torch.bfloat16, device=device)
    idx = torch.empty(0, NUM_TOPK, dtype=torch.int64, device=device)
    results = [buffer.dispatch(x, idx, host_sync=False) for _ in range(buffer.settings.num_slots)]
    for result in results:
        result.x.fill_(torch.nan)
        result.release()


def num_ranks(topology: str) -> int:
    num_nodes, ranks_per_node = sizes(topology)
    return num_nodes * ranks_per_node
