"""Bytes that a routing moves, by link class: counted from `topk_idx` alone, not from what some backend did.

Counted are rows that leave a rank: payload and scales, not counts, flags or the ids that travel with a row.
- Own node: `rank` rows go once to each destination rank. `expert` and `padded` rows of the cpu backend go once to each
  local expert's place; on GPUs they cross once for each destination rank too, which doubles them at home.
- Other nodes: one row per token and node to the rail peer (`network`), which stores it on its node: in `rank` once to
  each destination rank, in `expert` and `padded` to each local expert's place, on all backends.
- Combine: one BF16 row per token and destination rank comes back (each rank adds its own experts first), to the source
  or, for tokens of other nodes, to the rail peer of the source; that sends one row per token and node (`network`).
A row that stays on its rank is no wire byte, but it is a logical one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.record import WireBytes

_BF16_BYTES = 2
_NODE_LINK = {"cpu": "shm", "cuda": "nvlink", "emulated": "nvlink"}


@dataclass(frozen=True)
class Traffic:
    """Bytes of one operation at the busiest rank; the busiest rank may differ from class to class.

    `least_network_bytes` are those of all ranks: one row for each token and other node that it goes to.
    """

    wire: WireBytes
    logical_bytes: int
    least_network_bytes: int = 0


def dispatch_traffic(cell: Cell, topk_idx: Sequence[torch.Tensor]) -> Traffic:
    """topk_idx: [tokens, num_topk] of every source rank."""
    per_expert = cell.layout != "rank"
    return _traffic(cell, topk_idx, cell.row_bytes, stored=per_expert and cell.backend == "cpu", relayed=per_expert)


def combine_traffic(cell: Cell, topk_idx: Sequence[torch.Tensor]) -> Traffic:
    """topk_idx: as for `dispatch_traffic`. Logical bytes are the rows that come back, own rows included."""
    return _traffic(cell, topk_idx, cell.hidden * _BF16_BYTES, stored=False, relayed=False)


def _traffic(cell: Cell, topk_idx: Sequence[torch.Tensor], row_bytes: int, stored: bool, relayed: bool) -> Traffic:
    """`stored`, `relayed`: whether rows of the own node, of other nodes, cross once for each expert of a rank."""
    device = topk_idx[0].device
    node_rows = torch.zeros(cell.num_ranks, cell.num_ranks, dtype=torch.int64, device=device)  # [storing, receiving]
    net_rows = torch.zeros(cell.num_ranks, cell.num_ranks, dtype=torch.int64, device=device)  # [source, relay]
    logical_rows = torch.zeros(cell.num_ranks, dtype=torch.int64, device=device)
    for source, idx in enumerate(topk_idx):
        slots = _slots_per_rank(cell, idx)
        once = slots.clamp(max=1)
        logical_rows += (slots if stored else once).sum(dim=0)
        local_rank = source % cell.ranks_per_node
        visits_node = (slots > 0).view(-1, cell.num_nodes, cell.ranks_per_node).any(dim=2)
        for node in range(cell.num_nodes):
            ranks = slice(node * cell.ranks_per_node, (node + 1) * cell.ranks_per_node)
            storing = source if node == source // cell.ranks_per_node else ranks.start + local_rank
            per_expert = stored if storing == source else relayed
            node_rows[storing, ranks] += (slots if per_expert else once)[:, ranks].sum(dim=0)
            if storing != source:
                net_rows[source, storing] += visits_node[:, node].sum()
    node_rows.fill_diagonal_(0)
    # Combine moves the same rows the other way: sent and received change places, and the larger of both is the same.
    node_link = {_NODE_LINK[cell.backend]: _busiest(node_rows) * row_bytes}
    wire = WireBytes(network=_busiest(net_rows) * row_bytes, **node_link)
    return Traffic(wire, int(logical_rows.max()) * row_bytes, int(net_rows.sum()) * row_bytes)


def _slots_per_rank(cell: Cell, topk_idx: torch.Tensor) -> torch.Tensor:
    """int64 [tokens, num_ranks]: how many of a token's experts each rank holds."""
    dest = torch.where(topk_idx >= 0, topk_idx // cell.num_local_experts, cell.num_ranks)
    counts = torch.zeros(topk_idx.shape[0], cell.num_ranks + 1, dtype=torch.int64, device=topk_idx.device)
    return counts.scatter_add_(1, dest, torch.ones_like(dest))[:, : cell.num_ranks]


def _busiest(rows: torch.Tensor) -> int:
    return int(torch.maximum(rows.sum(dim=0), rows.sum(dim=1)).max())


def mean_traffic(by_iteration: Sequence[Traffic]) -> Traffic:
    """The mean over iterations."""
    wire = WireBytes(
        nvlink=_mean(each.wire.nvlink for each in by_iteration),
        network=_mean(each.wire.network for each in by_iteration),
        shm=_mean(each.wire.shm for each in by_iteration),
    )
    least = _mean(each.least_network_bytes for each in by_iteration)
    return Traffic(wire, _mean(each.logical_bytes for each in by_iteration), least)


def _mean(values: Iterable[int]) -> int:
    return round(statistics.fmean(values))
