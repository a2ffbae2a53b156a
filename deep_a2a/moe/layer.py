"""A ready MoE layer over a `Buffer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deep_a2a.moe.autograd import BF16, Dispatched, RowFormat, as_row_format, combine, dispatch
from deep_a2a.moe.experts import RoutedExperts, SharedExpert
from deep_a2a.routing import Gate, Router

if TYPE_CHECKING:
    from deep_a2a import Buffer


class MoELayer(nn.Module):
    """A gate, the routed experts of this rank, and a shared expert if wanted.

    Works with every layout of the buffer. Layers that run one after the other may share a buffer.

    Gate and shared expert are replicated: their gradients have to be summed over the ranks. Every routed expert exists
    once, and its gradient covers the tokens of all ranks already. `split_parameters` tells the two kinds apart. For the
    gradient of the mean over all ranks' losses, divide each rank's loss by the number of ranks before ``backward()``.

    Args:
        buffer: has the channels, the experts and the layout.
        router: how the gate chooses; with the `num_experts` and `num_topk` of the buffer.
        intermediate: inner channels of a routed expert.
        shared_intermediate: inner channels of the shared expert; None for no shared expert.
        row_format: of the rows that dispatch sends; "fp8" is short for ``RowFormat("fp8")``.
        grad_format: of the gradient rows that the backward pass of combine sends; as `row_format`.
        compute_dtype: of the experts' matrix products, torch.float32 or torch.bfloat16; parameters are float32.
        seed: of the experts' first weights, which are the same on any number of ranks. The gate's come from torch's
            default generator, as in all modules, so seed that equally on all ranks or broadcast them.
        lane: of the buffer.

    Attributes:
        expert_load: int64 [num_experts], tokens that all ranks sent to each expert in training mode since the last
            `update_bias`.

    Raises:
        TypeError, ValueError: `router` does not fit `buffer`, or a format is none; the message names the argument.
    """

    expert_load: Tensor

    def __init__(
        self,
        buffer: Buffer,
        router: Router,
        intermediate: int,
        *,
        shared_intermediate: int | None = None,
        row_format: RowFormat | str = BF16,
        grad_format: RowFormat | str = BF16,
        compute_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        lane: int = 0,
    ) -> None:
        for name in ("num_experts", "num_topk"):
            asked, expected = getattr(router, name), getattr(buffer, name)
            if asked != expected:
                raise ValueError(f"router.{name} is {asked}, expected the buffer's {expected}")
        super().__init__()
        self.buffer = buffer
        self.row_format = as_row_format("row_format", row_format)
        self.grad_format = as_row_format("grad_format", grad_format)
        self.lane = lane
        self.gate = Gate(buffer.hidden, router)
        self.experts = RoutedExperts(
            buffer.hidden,
            intermediate,
            first_expert=buffer.rank * buffer.num_local_experts,
            num_experts=buffer.num_local_experts,
            seed=seed,
            compute_dtype=compute_dtype,
        )
        self.shared: SharedExpert | None = None
        if shared_intermediate is not None:
            self.shared = SharedExpert(buffer.hidden, shared_intermediate, seed=seed, compute_dtype=compute_dtype)
        self.register_buffer("expert_load", torch.zeros(buffer.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer; all ranks together, each with its own tokens.

        Args:
            x: [..., hidden] of any floating-point dtype, at most `num_max_tokens_per_rank` tokens. The gate and the
                shared expert see it as it is, the routed experts in BF16 or FP8.

        Returns:
            [..., hidden] in the dtype of `x`.
        """
        tokens = x.reshape(-1, x.shape[-1])
        topk_idx, topk_weights = self.gate(tokens)
        dispatched = dispatch(
            self.buffer,
            tokens.to(torch.bfloat16),
            topk_idx,
            topk_weights,
            row_format=self.row_format,
            lane=self.lane,
        )
        if self.training:
            self.expert_load += dispatched.result.expert_load
        rows = self._run_experts(dispatched).to(torch.bfloat16)
        y = combine(self.buffer, rows, dispatched, grad_format=self.grad_format).to(x.dtype)
        if self.shared is not None:
            y = y + self.shared(tokens).to(x.dtype)
        return y.view_as(x)

    def update_bias(self, speed: float) -> Tensor:
        """Step the gate's bias against the load since the last call, see `deep_a2a.routing.update_bias`.

        Every rank has the load of all ranks from dispatch, so nothing is exchanged.

        Returns:
            That load, int64 [num_experts].
        """
        load = self.expert_load.clone()
        self.gate.update_bias(load, speed)
        self.expert_load.zero_()
        return load

    def _run_experts(self, dispatched: Dispatched) -> Tensor:
        if self.buffer.layout == "rank":
            return self._run_rank_rows(dispatched)
        if self.buffer.layout == "expert":
            return self._run_expert_rows(dispatched)
        return self._run_padded_rows(dispatched)

    def _run_rank_rows(self, dispatched: Dispatched) -> Tensor:
        result = dispatched.result
        rows, slots = (result.topk_idx >= 0).nonzero(as_tuple=True)
        by_expert = result.topk_idx[rows, slots].argsort(stable=True)
        rows, slots = rows[by_expert], slots[by_expert]
        y = self.experts(dispatched.rows.index_select(0, rows), result.rows_per_expert.tolist())
        weighed = y.float() * dispatched.weights[rows, slots].unsqueeze(-1)
        return torch.zeros_like(dispatched.rows, dtype=torch.float32).index_add(0, rows, weighed)

    def _run_expert_rows(self, dispatched: Dispatched) -> Tensor:
        # Groups with their padding, as a grouped GEMM takes them: rows of zeros, which stay zeros.
        offsets = dispatched.result.expert_offsets
        assert offsets is not None
        y: Tensor = self.experts(dispatched.rows, offsets.diff().tolist())
        return y

    def _run_padded_rows(self, dispatched: Dispatched) -> Tensor:
        sizes, capacity = dispatched.result.rows_per_expert.tolist(), dispatched.rows.shape[1]
        valid = torch.cat([rows[:size] for rows, size in zip(dispatched.rows.unbind(), sizes, strict=True)])
        groups = torch.split(self.experts(valid, sizes), sizes)
        return torch.stack([F.pad(group, (0, 0, 0, capacity - len(group))) for group in groups])


@dataclass(frozen=True)
class ParameterSplit:
    """shared: replicated, gradients to be summed over the ranks. expert: held by this rank alone, not to be summed."""

    shared: list[nn.Parameter]
    expert: list[nn.Parameter]


def split_parameters(model: nn.Module) -> ParameterSplit:
    """Tell the parameters of the routed experts in `model` from all others; both in the order of ``parameters()``."""
    routed = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    local = {id(parameter) for experts in routed for parameter in experts.parameters()}
    split = ParameterSplit([], [])
    for parameter in model.parameters():
        (split.expert if id(parameter) in local else split.shared).append(parameter)
    return split
