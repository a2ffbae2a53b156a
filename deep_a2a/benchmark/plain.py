"""The plain computation that results are compared with: indexing and sums in torch, on data every rank can make.

It knows the documented order of rows and the documented order of sums, and nothing of how a backend gets there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.workload import Payload, Routing, expert_output

_CACHED_ROWS, _MANY_ROWS = 128, 8192


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


def require_rows(
    what: str, rows: torch.Tensor, places: torch.Tensor, source: Sequence[torch.Tensor], tokens: torch.Tensor
) -> None:
    """Raises ValueError unless row `places[i]` of `rows` is that of token `tokens[i]`, bit by bit.

    rows: [n, ...]; source: [num_tokens, ...] of each rank, indexed by the tokens' ids.
    """
    got = _as_words(rows)
    for first_token, part in _parts(source):
        expected = _as_words(part)
        here = ((tokens >= first_token) & (tokens < first_token + part.shape[0])).nonzero().flatten()
        for chunk in torch.split(here, chunk_rows(here.device)):
            differ = got[places[chunk]] != expected[tokens[chunk] - first_token]
            if differ.any():
                wrong = chunk[differ.any(dim=1)][0]
                raise ValueError(f"{what}: row {int(places[wrong])} is not that of token {int(tokens[wrong])}")


def require_delivered(
    cell: Cell, received: ReceivedRows, payloads: Sequence[Payload], delivered: Delivered, capacity: int
) -> None:
    """Raises ValueError unless a dispatch delivered what it should. payloads: by source; capacity: of layout padded."""
    tokens = received.tokens if cell.layout == "rank" else received.expert_tokens
    places = row_places(cell, received, capacity)
    num_rows = cell.num_local_experts * capacity if cell.layout == "padded" else tokens.shape[0]
    rows, scales = delivered.rows.flatten(0, -2), delivered.scales
    if rows.shape[0] != num_rows or delivered.topk_idx.shape[0] != received.tokens.shape[0]:
        raise ValueError(
            f"dispatch delivered {rows.shape[0]} rows of {delivered.topk_idx.shape[0]} tokens; "
            f"the plain computation gives {num_rows} of {received.tokens.shape[0]}"
        )
    require_rows("dispatched rows", rows, places, [each for each, _ in payloads], tokens)
    expected_scales = [each for _, each in payloads if each is not None]
    if (scales is None) != (not expected_scales):
        raise ValueError(f"scales are {'missing' if scales is None else 'there'}, contrary to dtype {cell.dtype}")
    if scales is not None:
        require_rows("dispatched scales", scales.flatten(0, -2), places, expected_scales, tokens)
    in_order = torch.arange(received.tokens.shape[0], device=tokens.device)
    require_rows("expert ids", delivered.topk_idx.to(torch.int64), in_order, [received.topk_idx], in_order)
    require_rows("top-k weights", delivered.topk_weights, in_order, [received.topk_weights], in_order)


def require_combined(got: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    """Raises ValueError unless a combine gave what it should: every bit, or but for the order of sums."""
    if got.shape != expected.shape:
        raise ValueError(f"combined rows have shape {tuple(got.shape)}; expected {tuple(expected.shape)}")
    if exact:
        in_order = torch.arange(expected.shape[0], device=expected.device)
        require_rows("combined rows", got, in_order, [expected], in_order)
    else:
        for chunk in slices(expected.shape[0], expected.device):
            error = (got[chunk].float() - expected[chunk].float()).abs()
            if not (error <= 2**-4 + 2**-6 * expected[chunk].float().abs()).all():
                raise ValueError(
                    f"combined rows: one of rows {chunk.start} to {chunk.start + error.shape[0] - 1} is off by "
                    f"{error.max()}"
                )


def row_places(cell: Cell, received: ReceivedRows, capacity: int) -> torch.Tensor:
    """int64: where each row of the layout lies in the (flattened) result: in order, but padded by expert."""
    if cell.layout == "rank":
        return torch.arange(received.tokens.shape[0], device=received.tokens.device)
    places = torch.arange(received.experts.shape[0], device=received.experts.device)
    if cell.layout == "expert":
        return places
    first = received.rows_per_expert.cumsum(0) - received.rows_per_expert
    local = received.experts % cell.num_local_experts
    return places - first[local] + local * capacity


def write_expert_output(
    cell: Cell, received: ReceivedRows, bases: Iterable[torch.Tensor], rank: int, y: torch.Tensor, capacity: int
) -> torch.Tensor:
    """What the rank's experts make of the received rows: written into `y`, and returned in the shape of the layout.

    bases: `Workload.expert_base` by source; y: bf16 [n, hidden] with room for the rows.
    """
    tokens = received.tokens if cell.layout == "rank" else received.expert_tokens
    who = torch.full_like(tokens, rank) if cell.layout == "rank" else received.experts
    places = row_places(cell, received, capacity)
    for first_token, base in _parts(bases):
        here = ((tokens >= first_token) & (tokens < first_token + base.shape[0])).nonzero().flatten()
        for chunk in torch.split(here, chunk_rows(here.device)):
            y[places[chunk]] = expert_output(base[tokens[chunk] - first_token], who[chunk])
    if cell.layout == "padded":
        return y[: cell.num_local_experts * capacity].view(cell.num_local_experts, capacity, cell.hidden)
    return y[: tokens.shape[0]]


def combined(
    cell: Cell, topk_idx: torch.Tensor, topk_weights: torch.Tensor, base: torch.Tensor, rank: int
) -> torch.Tensor:
    """What combine gives `rank`, to the bit: bf16 [num_tokens, hidden].

    topk_idx, topk_weights, base: of the rank's own tokens; the experts' outputs are `expert_output(base, ...)`.
    Products and sums are formed in double precision and rounded to float32 after each step, which is what a fused
    multiply-add gives but for a double rounding in about one of 2^29 cases.
    """
    dest = topk_idx.div(cell.num_local_experts, rounding_mode="floor")
    chunks = slices(base.shape[0], base.device)
    own_node = rank // cell.ranks_per_node
    sums = [_add_nodes(cell, dest[c], topk_idx[c], topk_weights[c], base[c], own_node) for c in chunks]
    return torch.cat(sums).bfloat16()


def _add_nodes(
    cell: Cell, dest: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, base: torch.Tensor, own_node: int
) -> torch.Tensor:
    """float32 [tokens, hidden]; dest is the rank of each slot's expert."""
    total = torch.zeros(base.shape, device=base.device)
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
    acc = torch.zeros(base.shape, device=base.device)
    for slot in range(experts.shape[1]):
        rows = (experts[:, slot] >= 0).nonzero().flatten()
        term = expert_output(base[rows], experts[rows, slot]).double() * weights[rows, slot].double().unsqueeze(1)
        acc[rows] = (term + acc[rows].double()).float()
    return acc.bfloat16()


def chunk_rows(device: torch.device) -> int:
    """Rows to take at a time: on a CPU what stays in its cache, on a GPU what is worth a kernel."""
    return _CACHED_ROWS if device.type == "cpu" else _MANY_ROWS


def slices(num_rows: int, device: torch.device) -> Iterator[slice]:
    """All rows in chunks."""
    step = chunk_rows(device)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _parts(source: Iterable[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """Each rank's rows, with the id of its first token: piece by piece, so that they stay in the cache."""
    first_token = 0
    for part in source:
        yield first_token, part
        first_token += part.shape[0]


def _as_words(rows: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, which compare bit by bit (and faster): int64 where a row's bytes allow it."""
    flat = rows.contiguous().view(torch.uint8)
    return flat.view(torch.int64) if flat.shape[1] % 8 == 0 else flat
