"""Spreads that have no closed form, by drawing tokens with the very functions of `deep_a2a.routing`, from a fixed seed.

The gate limits a token to the groups with the best two experts, so what it keeps depends on how scores are distributed:
here evenly between 0 and 1, and independent. Zipf routing has a popularity for each expert, in the order that
`synthetic` gives them by default, so that the busiest rank is that of the benchmark.
"""

from __future__ import annotations

import torch

from deep_a2a.routing import Router, node_limited_topk, synthetic

from .spread import Spread
from .workload import Workload

SEED = 0
# Of a sample; enough for three digits of any mean, and about a second.
_SAMPLE_SCORES = 2**24
_BATCH_SCORES = 2**21


def sampled_spread(workload: Workload) -> Spread:
    """Of any routing. Where experts are alike, so are ranks: their differences in the sample are no part of the answer.

    The standard error of the ranks of a token is at most a hundredth of one for 256 experts.
    """
    num_tokens = _SAMPLE_SCORES // workload.num_experts
    batch = max(1, _BATCH_SCORES // workload.num_experts)
    generator = torch.Generator().manual_seed(SEED)
    ranks = torch.zeros(workload.num_ranks, dtype=torch.int64)
    nodes = torch.zeros(workload.num_nodes, dtype=torch.int64)
    slots = torch.zeros(workload.num_ranks, dtype=torch.int64)
    for first in range(0, num_tokens, batch):
        owner = _draw(workload, min(batch, num_tokens - first), generator) // workload.num_local_experts
        slots += torch.bincount(owner.flatten(), minlength=workload.num_ranks)
        ranks += _tokens_at(owner, workload.num_ranks)
        nodes += _tokens_at(owner // workload.ranks_per_node, workload.num_nodes)
    rank_hits, node_hits, rank_slots = (_shares(count, num_tokens, workload) for count in (ranks, nodes, slots))
    return Spread(rank_hits, node_hits, rank_slots, f"sampled: {num_tokens} tokens, seed {SEED}")


def _shares(count: torch.Tensor, num_tokens: int, workload: Workload) -> tuple[float, ...]:
    shares = count.double() / num_tokens
    return tuple((shares if workload.routing == "zipf" else shares.mean().expand_as(shares)).tolist())


def _draw(workload: Workload, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [tokens, num_topk]."""
    if workload.routing == "gate":
        router = Router(
            num_experts=workload.num_experts,
            num_topk=workload.num_topk,
            num_groups=workload.groups,
            topk_groups=workload.kept_groups,
        )
        return node_limited_topk(torch.rand(num_tokens, workload.num_experts, generator=generator), router)[0]
    limited = workload.topk_groups is not None
    return synthetic(
        workload.routing,
        num_tokens,
        workload.num_experts,
        workload.num_topk,
        workload.num_ranks,
        seed=generator,
        num_groups=workload.groups if limited else None,
        topk_groups=workload.topk_groups,
    )[0]


def _tokens_at(place: torch.Tensor, num_places: int) -> torch.Tensor:
    """int64 [num_places]: how many tokens have at least one of their experts at each place."""
    visited = torch.zeros(len(place), num_places, dtype=torch.bool)
    return visited.scatter_(1, place, True).sum(dim=0)
