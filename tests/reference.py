"""The oracle: what every rank has to receive and to get back, in plain torch, from all ranks' data at once.

It is written from the definition of the API and imports nothing from the implementation. Lists are by rank. A token's
global number is its place among the tokens of all ranks, by rank and then by token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from reference_math import fma, to_bf16


@dataclass(frozen=True)
class Setting:
    """What of a buffer's arguments decides about the results. `expert_capacity` is for layout "padded"."""

    num_ranks: int
    ranks_per_node: int
    num_experts: int
    num_topk: int
    layout: str = "rank"
    expert_alignment: int = 1
    expert_capacity: int = 0

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node


@dataclass(frozen=True)
class Dispatched:
    """What one rank receives. Rows of x that belong to no token hold anything, or zeros if these were asked for."""

    rank_tokens: torch.Tensor  # int64 [rank_rows]: global number of each rank row's token
    row_tokens: torch.Tensor  # int64 [rows]: the same for each row of x (padded: flattened), -1 where there is none
    x: torch.Tensor  # [rows, hidden], zeros where row_tokens is -1
    scales: torch.Tensor | None  # [rows, groups], likewise
    topk_idx: torch.Tensor  # int32 [rank_rows, num_topk]
    topk_weights: torch.Tensor  # float32 [rank_rows, num_topk]
    expert_rows: torch.Tensor | None  # int32 [rank_rows, num_topk]
    row_weights: torch.Tensor | None  # float32 [rows]
    rows_per_expert: torch.Tensor  # int32 [num_local_experts]
    expert_offsets: torch.Tensor | None  # int32 [num_local_experts + 1]
    rows_per_rank: torch.Tensor  # int32 [num_ranks]
    expert_load: torch.Tensor  # int32 [num_experts]


def scale_words(scales: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of scale_layout "column_major": FP32 as it is, of UE8M0 four in one int32, the first lowest."""
    if scales.dtype == torch.float32:
        return scales
    words = torch.zeros(len(scales), -(-scales.shape[1] // 4), dtype=torch.int64)
    for group in range(scales.shape[1]):
        words[:, group // 4] += scales[:, group].long() << 8 * (group % 4)
    return torch.where(words < 2**31, words, words - 2**32).int()


# ---- dispatch --------------------------------------------------------------------------------------------------


def dispatch(
    setting: Setting,
    payload: list[torch.Tensor],
    scales: list[torch.Tensor] | None,
    topk_idx: list[torch.Tensor],
    topk_weights: list[torch.Tensor],
) -> list[Dispatched]:
    """What each rank receives when the ranks send `payload` [tokens, hidden] (with `scales` [tokens, groups])."""
    rows = torch.cat(payload)
    row_scales = None if scales is None else torch.cat(scales)
    idx = torch.cat(topk_idx).long()
    weights = torch.cat(topk_weights)
    sources = token_sources(topk_idx)
    load = torch.bincount(idx[idx >= 0], minlength=setting.num_experts).int()
    return [receive(setting, rank, rows, row_scales, idx, weights, sources, load) for rank in range(setting.num_ranks)]


def token_sources(topk_idx: list[torch.Tensor]) -> torch.Tensor:
    """int64 [all tokens]: the rank that each token comes from."""
    return torch.cat([torch.full((len(idx),), rank) for rank, idx in enumerate(topk_idx)])


def receive(
    setting: Setting,
    rank: int,
    payload: torch.Tensor,
    scales: torch.Tensor | None,
    idx: torch.Tensor,
    weights: torch.Tensor,
    sources: torch.Tensor,
    load: torch.Tensor,
) -> Dispatched:
    first_expert = rank * setting.num_local_experts
    local = (idx >= first_expert) & (idx < first_expert + setting.num_local_experts)
    rank_tokens = local.any(1).nonzero().flatten()
    local = local[rank_tokens]
    local_idx = torch.where(local, idx[rank_tokens] - first_expert, -1)
    local_weights = torch.where(local, weights[rank_tokens], 0.0)
    # By expert: its rank rows and their slots, in this order. A token may name an expert twice: it then gets two rows.
    members = [(local_idx == expert).nonzero(as_tuple=True) for expert in range(setting.num_local_experts)]
    counts = [len(rank_rows) for rank_rows, _ in members]
    row_tokens, expert_rows, row_weights, offsets = rank_tokens, None, None, None
    if setting.layout != "rank":
        offsets = expert_starts(setting, counts)
        row_tokens = torch.full((int(offsets[-1]),), -1)
        row_weights = torch.zeros(int(offsets[-1]))
        expert_rows = torch.full_like(local_idx, -1)
        for start, (rank_rows, slots) in zip(offsets.tolist(), members, strict=False):
            places = start + torch.arange(len(rank_rows))
            row_tokens[places] = rank_tokens[rank_rows]
            expert_rows[rank_rows, slots] = places
            row_weights[places] = local_weights[rank_rows, slots]
    return Dispatched(
        rank_tokens=rank_tokens,
        row_tokens=row_tokens,
        x=take_rows(payload, row_tokens),
        scales=None if scales is None else take_rows(scales, row_tokens),
        topk_idx=local_idx.int(),
        topk_weights=local_weights,
        expert_rows=None if expert_rows is None else expert_rows.int(),
        row_weights=row_weights,
        rows_per_expert=torch.tensor(counts, dtype=torch.int32),
        expert_offsets=None if offsets is None else offsets.int(),
        rows_per_rank=torch.bincount(sources[rank_tokens], minlength=setting.num_ranks).int(),
        expert_load=load,
    )


def expert_starts(setting: Setting, counts: list[int]) -> torch.Tensor:
    """int64 [num_local_experts + 1]: where each expert's group starts; the last one is where the rows end."""
    if setting.layout == "padded":
        return torch.arange(len(counts) + 1) * setting.expert_capacity
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + -(-count // setting.expert_alignment) * setting.expert_alignment)
    return torch.tensor(starts)


def take_rows(data: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`data[tokens]`, zeros where a token is -1; as bytes, because not every dtype can be indexed."""
    as_bytes = data.contiguous().view(torch.uint8)
    taken = torch.zeros(len(tokens), as_bytes.shape[1], dtype=torch.uint8)
    taken[tokens >= 0] = as_bytes[tokens[tokens >= 0]]
    return taken.view(data.dtype)


# ---- combine ---------------------------------------------------------------------------------------------------


def combine(
    setting: Setting,
    dispatched: list[Dispatched],
    sources: torch.Tensor,
    rows: list[torch.Tensor],
    weighted: bool,
) -> list[torch.Tensor]:
    """The sums [tokens, hidden] BF16 that each source gets back for the expert outputs `rows` [rows, hidden] BF16."""
    hidden = rows[0].shape[1]
    source_nodes = sources // setting.ranks_per_node
    total, has_total = torch.zeros(len(sources), hidden), torch.zeros(len(sources), 1, dtype=torch.bool)
    for node in range(setting.num_nodes):
        node_sum, has_sum = torch.zeros_like(total), torch.zeros_like(has_total)
        for rank in range(node * setting.ranks_per_node, (node + 1) * setting.ranks_per_node):
            tokens = dispatched[rank].rank_tokens
            term = partial_row(setting, dispatched[rank], rows[rank], weighted).float()
            node_sum[tokens] = torch.where(has_sum[tokens], node_sum[tokens] + term, term)
            has_sum[tokens] = True
        crossed = to_bf16(node_sum).float()
        node_sum = torch.where((source_nodes == node)[:, None], node_sum, crossed)
        total = torch.where(has_sum, torch.where(has_total, total + node_sum, node_sum), total)
        has_total |= has_sum
    result = to_bf16(total)
    return [result[sources == rank] for rank in range(setting.num_ranks)]


def partial_row(setting: Setting, dispatched: Dispatched, rows: torch.Tensor, weighted: bool) -> torch.Tensor:
    """The one row BF16 per rank row that a rank contributes: the layer's own, or the sum over its expert rows."""
    if dispatched.expert_rows is None:
        return rows
    num_rank_rows = len(dispatched.rank_tokens)
    total, has_total = torch.zeros(num_rank_rows, rows.shape[1]), torch.zeros(num_rank_rows, 1, dtype=torch.bool)
    for slot in range(setting.num_topk):
        here = (dispatched.expert_rows[:, slot] >= 0).nonzero().flatten()
        term = rows[dispatched.expert_rows[here, slot].long()].float()
        if weighted:
            weight = dispatched.topk_weights[here, slot, None]
            later = fma(weight.expand_as(term), term, total[here])
            term = weight * term
        else:
            later = total[here] + term
        total[here] = torch.where(has_total[here], later, term)
        has_total[here] = True
    return to_bf16(total)


def side(
    setting: Setting, dispatched: list[Dispatched], sources: torch.Tensor, values: list[torch.Tensor]
) -> list[torch.Tensor]:
    """float32 [tokens, num_topk] at each source: each slot's value from the rank of its expert, 0 without one."""
    result = torch.zeros(len(sources), setting.num_topk)
    for received, value in zip(dispatched, values, strict=True):
        rank_row, slot = (received.topk_idx >= 0).nonzero(as_tuple=True)
        if received.expert_rows is None:
            taken = value[rank_row, slot]
        else:
            taken = value.flatten()[received.expert_rows[rank_row, slot].long()]
        result[received.rank_tokens[rank_row], slot] = taken
    return [result[sources == rank] for rank in range(setting.num_ranks)]


# ---- bytes on the wire -----------------------------------------------------------------------------------------


def wire_rows(
    setting: Setting, topk_idx: list[torch.Tensor], combining: bool = False, pulled: bool = False
) -> tuple[list[int], list[int]]:
    """Rows that each rank moves: (between itself and other ranks of its node, to other nodes).

    Dispatch: a token crosses to each other node that it needs once, to the rank with the source's local index, which
    then writes the rows of its node; a row that a rank writes for itself crosses nothing. In combine the same ranks
    read, always one row per token and rank, and send one row per token back over the network. Where rows of the own
    node are pulled, they cross once for all experts of a rank; a relay writes to each expert.
    """
    near, far = [0] * setting.num_ranks, [0] * setting.num_ranks
    local_experts, ranks_per_node = setting.num_local_experts, setting.ranks_per_node
    for source, idx in enumerate(topk_idx):
        own_node, place = divmod(source, ranks_per_node)
        for experts in idx.tolist():
            slots = Counter(expert // local_experts for expert in experts if expert >= 0)  # of this token, by owner
            for owner, copies in slots.items():
                writer = owner // ranks_per_node * ranks_per_node + place
                once = combining or setting.layout == "rank" or (pulled and writer == source)
                near[writer] += (owner != writer) * (1 if once else copies)
            for node in {owner // ranks_per_node for owner in slots} - {own_node}:
                far[node * ranks_per_node + place if combining else source] += 1
    return near, far
