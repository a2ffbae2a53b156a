"""How many different ranks and nodes a token goes to.

For uniform routing this is exact. Experts are drawn one after another without replacement; the first ones drawn decide
which groups (nodes) a token keeps, and once these are all found it draws on from them alone. What matters after some
draws is how many groups and how many ranks they have touched, so the distribution of the two is carried from draw to
draw. Without a limit the mean is that of the hypergeometric distribution: a rank of `e` experts is missed with
probability C(E - e, K) / C(E, K).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from .workload import Workload


@dataclass(frozen=True)
class Spread:
    """Where the tokens of any one rank go; all ranks route alike.

    Attributes:
        rank_hits, node_hits: for each rank and node the probability that a token has an expert there.
        rank_slots: for each rank the mean number of a token's experts there.
        method: how this was found.
    """

    rank_hits: tuple[float, ...]
    node_hits: tuple[float, ...]
    rank_slots: tuple[float, ...]
    method: str

    @property
    def ranks_per_token(self) -> float:
        return sum(self.rank_hits)

    @property
    def nodes_per_token(self) -> float:
        return sum(self.node_hits)

    @property
    def busiest_rank(self) -> float:
        """Rows of the busiest rank over the mean: 1.0 where all are alike."""
        return max(self.rank_hits) * len(self.rank_hits) / self.ranks_per_token


def find_spread(workload: Workload) -> Spread:
    """Exact for uniform routing with groups that are nodes; else sampled, which needs torch."""
    if workload.routing == "uniform" and (workload.topk_groups is None or workload.groups == workload.num_nodes):
        return exact_spread(workload)
    from .sampled import sampled_spread

    return sampled_spread(workload)


def exact_spread(workload: Workload) -> Spread:
    """Of uniform routing, limited to `kept_groups` nodes."""
    kept = workload.num_nodes if workload.topk_groups is None else workload.topk_groups
    nodes, ranks = mean_groups_and_ranks(
        workload.num_experts, workload.num_topk, workload.num_nodes, workload.num_ranks, kept
    )
    slots = workload.num_topk / workload.num_ranks
    return Spread(
        rank_hits=(ranks / workload.num_ranks,) * workload.num_ranks,
        node_hits=(nodes / workload.num_nodes,) * workload.num_nodes,
        rank_slots=(slots,) * workload.num_ranks,
        method="exact",
    )


def mean_groups_and_ranks(
    num_experts: int, num_topk: int, num_groups: int, num_ranks: int, kept_groups: int
) -> tuple[float, float]:
    """Mean numbers of different groups and ranks among `num_topk` experts, of at most `kept_groups` groups.

    Groups and ranks are made of consecutive experts, and a group of whole ranks.
    """
    group_experts, rank_experts = num_experts // num_groups, num_experts // num_ranks
    group_ranks = num_ranks // num_groups
    states: dict[tuple[int, int], float] = {(0, 0): 1.0}
    for drawn in range(num_topk):
        later: dict[tuple[int, int], float] = defaultdict(float)
        for (groups, ranks), probability in states.items():
            of_new_group = (num_groups - groups) * group_experts if groups < kept_groups else 0
            of_new_rank = (groups * group_ranks - ranks) * rank_experts
            of_old_rank = ranks * rank_experts - drawn
            left = of_new_group + of_new_rank + of_old_rank
            for experts, state in (
                (of_new_group, (groups + 1, ranks + 1)),
                (of_new_rank, (groups, ranks + 1)),
                (of_old_rank, (groups, ranks)),
            ):
                if experts:
                    later[state] += probability * experts / left
        states = later
    mean_groups = sum(groups * probability for (groups, _), probability in states.items())
    mean_ranks = sum(ranks * probability for (_, ranks), probability in states.items())
    return mean_groups, mean_ranks
