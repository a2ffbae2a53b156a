"""The same MoE layer without ranks: what the distributed one is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deep_a2a.demo.config import DemoConfig
from deep_a2a.moe import RoutedExperts, SharedExpert, swiglu
from deep_a2a.routing import Gate


class DenseMoE(nn.Module):
    """Gate, all routed experts and the shared expert in one process, in FP32: no buffer, no rows, no rounding.

    Parameters have the names that they have in `MoELayer`, those of the routed experts stacked over all experts.
    """

    expert_load: Tensor

    def __init__(self, config: DemoConfig, seed: int) -> None:
        super().__init__()
        self.gate = Gate(config.hidden, config.router)
        self.experts = RoutedExperts(
            config.hidden, config.expert_intermediate, first_expert=0, num_experts=config.num_experts, seed=seed
        )
        self.shared = SharedExpert(config.hidden, config.shared_intermediate, seed=seed)
        self.register_buffer("expert_load", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [..., hidden]; returns the same shape."""
        tokens = x.reshape(-1, x.shape[-1])
        topk_idx, topk_weights = self.gate(tokens)
        y: Tensor = self.shared(tokens)
        weights = zip(self.experts.w_in.unbind(), self.experts.w_out.unbind(), strict=True)
        for expert, (w_in, w_out) in enumerate(weights):
            chosen_by, slot = (topk_idx == expert).nonzero(as_tuple=True)
            out = swiglu(tokens[chosen_by], w_in, w_out) * topk_weights[chosen_by, slot].unsqueeze(-1)
            y = y.index_add(0, chosen_by, out)
            if self.training:
                self.expert_load[expert] += len(chosen_by)
        return y.view_as(x)

    def update_bias(self, speed: float) -> Tensor:
        """As `MoELayer.update_bias`."""
        load = self.expert_load.clone()
        self.gate.update_bias(load, speed)
        self.expert_load.zero_()
        return load
