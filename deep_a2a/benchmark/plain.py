"""The plain computation that results are compared with: indexing and sums in torch, on data every rank can make.

It knows the documented order of rows and the documented order of sums, and nothing of how a backend gets there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.workload import Payload, Routing, expert_output

_CHUNK_ROWS = 128


@dataclass(frozen=True)
class ReceivedRows:
    """Which rows a rank receives. A token's id is source * num_tokens + its place at the source.

    Attributes:
        tokens: int64 [rank_rows], ids by source, then place: one row per token and rank.
        topk_idx: int64 [rank_rows, num_topk], local expert or -1.
        topk_weights: float32 [rank_rows, num_topk], 0 where topk_idx is -1.
        expert_tokens: int64 [expert_rows], ids by local expert, then source, then place.
        experts: int64 [expert_rows], global expert of each.
        rows_per_expert: int64 [num_local_experts].
    """

    tokens: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    expert_tokens: torch.Tensor
    experts: torch.Tensor
    rows_per_expert: torch.Tensor


@dataclass(frozen=True)
class Delivered:
    """What a dispatch delivered, cut to its valid rows (layout padded: all rows).

    Attributes:
        rows, scales: [rows, ...], or [num_local_experts, capacity, ...] for layout padded.
        topk_idx, topk_weights: [rank_rows, num_topk].
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def received_rows(cell: Cell, routing: Routing, rank: int) -> ReceivedRows:
    topk_idx, weights = torch.cat(routing.topk_idx), torch.cat(routing.topk_weights)
    here = topk_idx.div(cell.num_local_experts, rounding_mode="floor") == rank
    tokens = here.any(dim=1).nonzero().flatten()
    here = here[tokens]
    local = torch.where(here, topk_idx[tokens] - rank * cell.num_local_experts, -1)
    place, slot = here.nonzero(as_tuple=True)
    by_expert = local[place, slot].argsort(stable=True)
    experts = local[place, slot][by_expert]
    return ReceivedRows(
        tokens=tokens,
        topk_idx=local,
        topk_weights=weights[tokens] * here,
        expert_tokens=tokens[place[by_expert]],
        experts=experts + rank * cell.num_local_experts,
        rows_per_expert=torch.bincount(experts, minlength=cell.num_local_experts),
    )


def require_rows(what: str, rows: torch.Tensor, source: torch.Tensor, tokens: torch.Tensor) -> None:
    """Raises ValueError unless `rows[i]` is `source[tokens[i]]`, bit by bit. rows: [n, ...], source: [tokens, ...]."""
    if rows.shape[0] != tokens.shape[0]:
        raise ValueError(f"{what}: {rows.shape[0]} rows; the plain computation gives {tokens.shape[0]}")
    got, expected = _as_words(rows), _as_words(source)
    for start in range(0, tokens.shape[0], _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        if not torch.equal(got[chunk], expected[tokens[chunk]]):
            wrong = (got[chunk] != expected[tokens[chunk]]).flatten(1).any(dim=1).nonzero().flatten() + start
            first = int(wrong[0])
            raise ValueError(f"{what}: row {first} is not that of token {int(tokens[first])}")


def require_delivered(cell: Cell, received: ReceivedRows, payload: Payload, delivered: Delivered) -> None:
    """Raises ValueError unless a dispatch delivered what it should. payload: of all tokens, by id."""
    tokens = received.tokens if cell.layout == "rank" else received.expert_tokens
    rows, scales = delivered.rows, delivered.scales
    if cell.layout == "padded":
        rows = valid_rows(received, rows)
        scales = None if scales is None else valid_rows(received, scales)
    require_rows("dispatched rows", rows, payload[0], tokens)
    if (scales is None) != (payload[1] is None):
        raise ValueError(f"scales are {'missing' if scales is None else 'there'}, contrary to dtype {cell.dtype}")
    if scales is not None and payload[1] is not None:
        require_rows("dispatched scales", scales, payload[1], tokens)
    in_order = torch.arange(received.tokens.shape[0])
    require_rows("expert ids", delivered.topk_idx.to(torch.int64), received.topk_idx, in_order)
    require_rows("top-k weights", delivered.topk_weights, received.topk_weights, in_order)


def require_combined(got: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    """Raises ValueError unless a combine gave what it should: every bit, or but for the order of sums."""
    if got.shape != expected.shape:
        raise ValueError(f"combined rows have shape {tuple(got.shape)}; expected {tuple(expected.shape)}")
    if exact:
        require_rows("combined rows", got, expected, torch.arange(expected.shape[0]))
    else:
        torch.testing.assert_close(got.float(), expected.float(), rtol=2**-6, atol=2**-4)


def valid_rows(received: ReceivedRows, padded: torch.Tensor) -> torch.Tensor:
    """[num_local_experts, capacity, ...] to [expert rows, ...]: each expert's valid prefix."""
    return torch.cat([padded[expert, :count] for expert, count in enumerate(received.rows_per_expert.tolist())])


def pad(rows: torch.Tensor, received: ReceivedRows, capacity: int) -> torch.Tensor:
    """The inverse of `valid_rows`; the rest is zero."""
    padded = rows.new_zeros(received.rows_per_expert.shape[0], capacity, *rows.shape[1:])
    for expert, part in enumerate(torch.split(rows, received.rows_per_expert.tolist())):
        padded[expert, : part.shape[0]] = part
    return padded


def combined(
    cell: Cell, topk_idx: torch.Tensor, topk_weights: torch.Tensor, base: torch.Tensor, rank: int
) -> torch.Tensor:
    """What combine gives `rank`, to the bit: bf16 [num_tokens, hidden].

    topk_idx, topk_weights, base: of the rank's own tokens; the experts' outputs are `expert_output(base, ...)`.
    Products and sums are formed in double precision and rounded to float32 after each step, which is what a fused
    multiply-add gives but for a double rounding in about one of 2^29 cases.
    """
    dest = topk_idx.div(cell.num_local_experts, rounding_mode="floor")
    chunks = (slice(start, start + _CHUNK_ROWS) for start in range(0, base.shape[0], _CHUNK_ROWS))
    own_node = rank // cell.ranks_per_node
    sums = [_add_nodes(cell, dest[c], topk_idx[c], topk_weights[c], base[c], own_node) for c in chunks]
    return torch.cat(sums).bfloat16()


def _add_nodes(
    cell: Cell, dest: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, base: torch.Tensor, own_node: int
) -> torch.Tensor:
    """float32 [tokens, hidden]; dest is the rank of each slot's expert."""
    total = torch.zeros(base.shape)
    for node in range(cell.num_nodes):
        node_sum = torch.zeros_like(total)
        for rank in range(node * cell.ranks_per_node, (node + 1) * cell.ranks_per_node):
            tokens = (dest == rank).any(dim=1).nonzero().flatten()
            if cell.layout == "rank":
                part = expert_output(base[tokens], rank)
            else:
                part = _weighted(base[tokens], torch.where(dest == rank, experts, -1)[tokens], weights[tokens])
            node_sum[tokens] += part.float()
        total += node_sum if node == own_node else node_sum.bfloat16().float()
    return total


def _weighted(base: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over slots of weight times expert output; experts: [n, num_topk] or -1. Returns bf16 [n, hidden]."""
    acc = torch.zeros(base.shape)
    for slot in range(experts.shape[1]):
        rows = (experts[:, slot] >= 0).nonzero().flatten()
        term = expert_output(base[rows], experts[rows, slot]).double() * weights[rows, slot].double().unsqueeze(1)
        acc[rows] = (term + acc[rows].double()).float()
    return acc.bfloat16()


def _as_words(rows: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, which compare bit by bit (and faster): int64 where a row's bytes allow it."""
    flat = rows.reshape(rows.shape[0], -1) if rows.shape[0] else rows.new_empty(0, rows[0:0].flatten(1).shape[1])
    flat = flat.contiguous().view(torch.uint8)
    return flat.view(torch.int64) if flat.shape[1] % 8 == 0 else flat
