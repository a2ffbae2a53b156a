"""The gate of DeepSeek-V3: sigmoid scores, a few groups of experts per token, a bias that only selects.

Source: DeepSeek-V3 technical report, arXiv 2412.19437, section 2.1.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from .balance import update_bias
from .checks import require_divides, require_int

_SUM_FLOOR = 1e-20


@dataclass(frozen=True)
class Router:
    """How experts are chosen; the defaults are those of DeepSeek-V3.

    Attributes:
        num_experts: global number of routed experts.
        num_topk: experts per token.
        num_groups: groups of ``num_experts // num_groups`` consecutive experts; a multiple of the number of nodes, so
            that each group lies on one node (`groups_for_nodes`). 1: no groups.
        topk_groups: groups that a token keeps; all its experts lie in these.
        scaling_factor: the weights of a token sum to this (``normalize=True``), or are multiplied by it.
        normalize: divide the weights of a token by their sum.

    Raises:
        TypeError, ValueError: a field is of the wrong kind or out of range; the message names it.
    """

    num_experts: int = 256
    num_topk: int = 8
    num_groups: int = 8
    topk_groups: int = 4
    scaling_factor: float = 2.5
    normalize: bool = True

    def __post_init__(self) -> None:
        require_int("num_experts", self.num_experts, 1)
        require_int("num_groups", self.num_groups, 1, self.num_experts)
        require_divides("num_groups", self.num_groups, "num_experts", self.num_experts)
        require_int("topk_groups", self.topk_groups, 1, self.num_groups)
        require_int("num_topk", self.num_topk, 1)
        num_candidates = self.topk_groups * self.experts_per_group
        if self.num_topk > num_candidates:
            raise ValueError(
                f"num_topk is {self.num_topk}, expected at most {num_candidates}: "
                f"topk_groups = {self.topk_groups} groups of {self.experts_per_group} experts"
            )
        if not math.isfinite(self.scaling_factor) or self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}, expected a finite number above 0")

    @property
    def experts_per_group(self) -> int:
        """Experts of one group."""
        return self.num_experts // self.num_groups

    def max_nodes_per_token(self, num_nodes: int) -> int:
        """The most nodes that a token can go to when the experts are spread over ``num_nodes`` nodes.

        Raises:
            ValueError: ``num_groups`` is not a multiple of ``num_nodes``: a group would lie on two nodes.
        """
        require_int("num_nodes", num_nodes, 1)
        require_divides("num_nodes", num_nodes, "num_groups", self.num_groups)
        return min(num_nodes, self.topk_groups, self.num_topk)


def node_limited_topk(
    scores: torch.Tensor, router: Router, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts within its best groups, and weigh them.

    1. The selection score of an expert is its score plus its bias.
    2. A group's score is the sum of its two best selection scores (of its only one, in groups of one expert).
    3. The ``topk_groups`` best groups stay; among their experts the ``num_topk`` best are chosen.
    4. The weights are the scores **without** bias, divided by their sum + 1e-20, times ``scaling_factor``.

    Ties go to the lower group and the lower expert id, so the choice depends on nothing but the numbers. NaN counts as
    larger than any number; -inf as a bias keeps an expert out as long as the kept groups have enough others.

    Args:
        scores: float32 ``[tokens, num_experts]``, not negative (a sigmoid's output). Gradients flow into it through the
            weights only.
        router: the sizes.
        bias: float32 ``[num_experts]``, or None for zeros. Gets no gradient.

    Returns:
        ``(topk_idx, topk_weights)``: int64 and float32 ``[tokens, num_topk]``; distinct experts, the best selection
        score first.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names it.
    """
    if scores.dtype != torch.float32:
        raise TypeError(f"scores has dtype {scores.dtype}, expected torch.float32")
    if scores.dim() != 2 or scores.shape[1] != router.num_experts:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected [tokens, {router.num_experts}]")
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (router.num_experts,)):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected torch.float32 ({router.num_experts},)")

    with torch.no_grad():
        topk_idx = _select(scores if bias is None else scores + bias, router)
    weights = scores.gather(1, topk_idx)
    if router.normalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + _SUM_FLOOR)
    return topk_idx, weights * router.scaling_factor


def _select(selection: torch.Tensor, router: Router) -> torch.Tensor:
    """Expert ids ``[tokens, num_topk]``. Only kept groups are sorted, so no mask value can let another group in."""
    if router.topk_groups == router.num_groups:
        return _best(selection, router.num_topk)
    grouped = selection.reshape(-1, router.num_groups, router.experts_per_group)
    group_scores = grouped.topk(min(2, router.experts_per_group), dim=2).values.sum(dim=2)
    # Ascending, so that among equals the lower expert still comes first.
    kept = _best(group_scores, router.topk_groups).sort(dim=1).values
    candidates = grouped.gather(1, kept.unsqueeze(2).expand(-1, -1, router.experts_per_group)).flatten(1)
    place = _best(candidates, router.num_topk)
    group = kept.gather(1, place // router.experts_per_group)
    return group * router.experts_per_group + place % router.experts_per_group


def _best(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest of each row. A stable sort: torch.topk leaves the order of equals open."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()


class Gate(nn.Module):
    """A linear layer, a sigmoid and `node_limited_topk`, computed in float32 whatever the dtype of the model.

    Args:
        hidden: channels of a token.
        router: the sizes.

    Attributes:
        weight: parameter ``[num_experts, hidden]``.
        expert_bias: buffer float32 ``[num_experts]``, part of the state dict; it stays float32 when the module is cast,
            since a step of `update_bias` is smaller than what bfloat16 resolves.
    """

    weight: nn.Parameter
    expert_bias: torch.Tensor

    def __init__(self, hidden: int, router: Router) -> None:
        super().__init__()
        require_int("hidden", hidden, 1)
        self.hidden = hidden
        self.router = router
        self.weight = nn.Parameter(torch.empty(router.num_experts, hidden))
        self.register_buffer("expert_bias", torch.zeros(router.num_experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight so that inputs of unit variance give logits of unit variance; set the bias to zero."""
        nn.init.normal_(self.weight, std=self.hidden**-0.5)
        nn.init.zeros_(self.expert_bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            x: ``[tokens, hidden]``, any floating-point dtype.

        Returns:
            ``(topk_idx, topk_weights)`` as `node_limited_topk` gives them, ready for `Buffer.dispatch`.

        Raises:
            ValueError: ``x`` has another shape.
        """
        if x.dim() != 2 or x.shape[1] != self.hidden:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected [tokens, {self.hidden}]")
        with torch.autocast(device_type=x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
            return node_limited_topk(scores, self.router, self.expert_bias)

    def update_bias(self, load: torch.Tensor, speed: float) -> None:
        """Step `expert_bias` against the measured load of all ranks; see `deep_a2a.routing.update_bias`."""
        update_bias(self.expert_bias, load, speed)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Gate:
        bias = self.expert_bias
        module = cast(Gate, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]
        if self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(self.expert_bias.device)
        return module

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, router={self.router}"
