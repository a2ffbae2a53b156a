"""Routing: which experts each token goes to.

- `Router`, `node_limited_topk`, `Gate`: the gate of DeepSeek-V3, limited to a few groups of experts per token.
- `groups_for_nodes`, `nodes_per_token`: how groups map to nodes, and a count that shows that the limit holds.
- `update_bias`, `expert_load`, `load_balance`: balancing without an auxiliary loss, from measured load.
- `synthetic`, `KINDS`: made-up routings for benchmarks and tests.

Everywhere: expert ``e`` lives on rank ``e // (num_experts // num_ranks)``, the ranks of a node and the experts of a
group are consecutive, and -1 in ``topk_idx`` means no expert.
"""

from __future__ import annotations

from .balance import expert_load, load_balance, update_bias
from .gate import Gate, Router, node_limited_topk
from .nodes import groups_for_nodes, nodes_per_token
from .synthetic import KINDS, synthetic

__all__ = [
    "KINDS",
    "Gate",
    "Router",
    "expert_load",
    "groups_for_nodes",
    "load_balance",
    "node_limited_topk",
    "nodes_per_token",
    "synthetic",
    "update_bias",
]
