"""Made-up routings: what a benchmark sends when there is no model, and what breaks a communication library."""

from __future__ import annotations

import math

import torch

from .checks import require_divides, require_int

KINDS = ("uniform", "zipf", "hot", "all_to_one_rank", "none_to_rank")
"""The kinds that `synthetic` knows."""


def synthetic(
    kind: str,
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    num_ranks: int,
    *,
    seed: int | torch.Generator = 0,
    exponent: float = 1.0,
    popularity_seed: int = 0,
    hot_expert: int = 0,
    target_rank: int = 0,
    num_groups: int | None = None,
    topk_groups: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw ``num_topk`` different experts for each token of one rank.

    Experts are drawn one after another without replacement, each with a probability in proportion to its popularity:

    - ``"uniform"``: all the same.
    - ``"zipf"``: the i-th most popular expert (from 1) has ``i ** -exponent``. The order of popularity is a permutation
      that depends on ``popularity_seed`` alone, so that ranks with different ``seed`` agree on it.
    - ``"hot"``: every token goes to ``hot_expert``; its other experts are uniform.
    - ``"all_to_one_rank"``: only experts of ``target_rank``.
    - ``"none_to_rank"``: any expert but those of ``target_rank``.

    With ``num_groups`` and ``topk_groups`` a token draws on from its first ``topk_groups`` groups only, which is what a
    node limit does (a group is ``num_experts // num_groups`` consecutive experts). A slot for which no expert is left
    (``all_to_one_rank`` with fewer than ``num_topk`` experts per rank, for instance) is -1 and weighs 0.

    Args:
        kind: one of `KINDS`.
        num_tokens: rows of the result, 0 or more.
        num_experts: global number of experts.
        num_topk: experts per token.
        num_ranks: ranks that hold the experts; must divide ``num_experts``.
        seed: an int (the same routing every time), or a CPU generator to go on with. Give every rank its own.
        exponent: of ``"zipf"``, at least 0 (0 is uniform).
        popularity_seed: of ``"zipf"``.
        hot_expert: of ``"hot"``, a global expert id.
        target_rank: of ``"all_to_one_rank"`` and ``"none_to_rank"``.
        num_groups, topk_groups: the node limit, both or neither.
        device: where the result goes; it is drawn on the CPU, so it does not depend on this.

    Returns:
        ``(topk_idx, topk_weights)``: int64 and float32 ``[num_tokens, num_topk]``. The weights are random, positive,
        and sum to 1.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
    require_int("num_tokens", num_tokens, 0)
    require_int("num_experts", num_experts, 1)
    require_int("num_topk", num_topk, 1, num_experts)
    require_int("num_ranks", num_ranks, 1)
    require_divides("num_ranks", num_ranks, "num_experts", num_experts)
    limit = _check_limit(num_experts, num_topk, num_groups, topk_groups)
    generator = seed if isinstance(seed, torch.Generator) else _generator("seed", seed)

    local_experts = num_experts // num_ranks
    log_popularity = torch.zeros(num_experts, dtype=torch.float64)
    if kind == "zipf":
        log_popularity = _zipf(num_experts, exponent, popularity_seed)
    elif kind == "hot":
        require_int("hot_expert", hot_expert, 0, num_experts - 1)
        log_popularity[hot_expert] = math.inf
    elif kind in ("all_to_one_rank", "none_to_rank"):
        require_int("target_rank", target_rank, 0, num_ranks - 1)
        on_target = torch.arange(num_experts) // local_experts == target_rank
        log_popularity[on_target if kind == "none_to_rank" else ~on_target] = -math.inf

    # The race of exponential clocks: the order in which clocks of rate p ring is a draw without replacement by p.
    clocks = torch.empty(num_tokens, num_experts, dtype=torch.float64).exponential_(generator=generator)
    keys = log_popularity - clocks.log_()
    if limit is not None:
        keys = _keep_best_groups(keys, *limit)
    best = keys.topk(num_topk, dim=1)
    filled = best.values > -math.inf

    weights = torch.rand(num_tokens, num_topk, generator=generator).clamp_(min=0.01) * filled
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_(min=0.01)  # a token without experts keeps its zeros
    return best.indices.masked_fill(~filled, -1).to(device), weights.to(device)


def _check_limit(
    num_experts: int, num_topk: int, num_groups: int | None, topk_groups: int | None
) -> tuple[int, int] | None:
    """The node limit as ``(num_groups, topk_groups)``, or None for no limit."""
    if num_groups is None and topk_groups is None:
        return None
    if num_groups is None or topk_groups is None:
        raise ValueError(f"num_groups is {num_groups} and topk_groups is {topk_groups}, expected both or neither")
    require_int("num_groups", num_groups, 1, num_experts)
    require_divides("num_groups", num_groups, "num_experts", num_experts)
    require_int("topk_groups", topk_groups, 1, num_groups)
    require_int("num_topk", num_topk, 1, topk_groups * (num_experts // num_groups))
    return num_groups, topk_groups


def _generator(name: str, seed: int) -> torch.Generator:
    require_int(name, seed, 0)
    return torch.Generator().manual_seed(seed)


def _zipf(num_experts: int, exponent: float, popularity_seed: int) -> torch.Tensor:
    if not math.isfinite(exponent) or exponent < 0:
        raise ValueError(f"exponent is {exponent}, expected a finite number of at least 0")
    order = torch.randperm(num_experts, generator=_generator("popularity_seed", popularity_seed))
    return -exponent * (order + 1).double().log()


def _keep_best_groups(keys: torch.Tensor, num_groups: int, topk_groups: int) -> torch.Tensor:
    grouped = keys.view(keys.shape[0], num_groups, keys.shape[1] // num_groups)
    kept = grouped.amax(dim=2).topk(topk_groups, dim=1).indices
    dropped = torch.ones(keys.shape[0], num_groups, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(2), -math.inf).flatten(1)
