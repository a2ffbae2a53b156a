"""Groups of experts and the nodes they live on."""

from __future__ import annotations

import torch

from .checks import require_divides, require_int, require_topk_idx


def groups_for_nodes(num_nodes: int, num_experts: int, at_least: int = 1) -> int:
    """The smallest number of groups that a node-limited router may use on ``num_nodes`` nodes.

    Only when ``num_groups`` is a multiple of ``num_nodes`` does each group lie on one node; then a token that keeps
    ``topk_groups`` groups goes to at most ``topk_groups`` nodes.

    Args:
        num_nodes: nodes of the job; must divide ``num_experts``.
        num_experts: global number of experts, which the groups must divide.
        at_least: ask for more groups than nodes, for example to train on 2 nodes the model that later runs on 8.

    Raises:
        TypeError: an argument is no int.
        ValueError: no number of groups fits; the message names the argument.
    """
    require_int("num_experts", num_experts, 1)
    require_int("num_nodes", num_nodes, 1)
    require_int("at_least", at_least, 1, num_experts)
    require_divides("num_nodes", num_nodes, "num_experts", num_experts)
    # num_experts itself is a multiple of num_nodes and not below at_least, so there always is one.
    multiples = range(num_nodes, num_experts + 1, num_nodes)
    return next(groups for groups in multiples if groups >= at_least and num_experts % groups == 0)


def nodes_per_token(topk_idx: torch.Tensor, num_experts: int, num_nodes: int) -> torch.Tensor:
    """Count the different nodes that each token goes to; with ``num_nodes = num_ranks``, the different ranks.

    Args:
        topk_idx: int32 or int64 ``[tokens, num_topk]``, global expert ids, -1 = no expert.
        num_experts: global number of experts, spread evenly and in order over the nodes.
        num_nodes: nodes of the job; must divide ``num_experts``.

    Returns:
        int64 ``[tokens]``, from 0 (no expert) to ``min(num_topk, num_nodes)``.

    Raises:
        TypeError, ValueError: an argument is out of range or of the wrong kind; the message names it.
    """
    require_topk_idx(topk_idx, num_experts)
    require_int("num_nodes", num_nodes, 1)
    require_divides("num_nodes", num_nodes, "num_experts", num_experts)
    # One column more than nodes: slots without an expert are marked there, and not counted.
    node = torch.where(topk_idx >= 0, topk_idx.long() // (num_experts // num_nodes), num_nodes)
    visited = torch.zeros(topk_idx.shape[0], num_nodes + 1, dtype=torch.bool, device=topk_idx.device)
    visited.scatter_(1, node, True)
    return visited[:, :num_nodes].sum(dim=1)
