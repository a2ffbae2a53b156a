"""SwiGLU experts: one that every token visits, and the group of routed ones that a rank holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """``w_out @ (silu(gate) * up)`` where ``(gate, up) = w_in @ x``: SwiGLU without biases (Shazeer, arXiv 2002.05202).

    Args:
        x: [..., hidden].
        w_in: [2 * intermediate, hidden], the rows of the gate first.
        w_out: [hidden, intermediate]. One dtype for all three.

    Returns:
        [..., hidden].
    """
    gate, up = F.linear(x, w_in).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_out)


class SharedExpert(nn.Module):
    """An expert that every token visits on its own rank; its parameters are replicated.

    Args:
        hidden, intermediate: channels of a token and of the inner layer.
        seed: of the first weights.
        compute_dtype: of the matrix products; parameters are float32.

    Attributes:
        w_in: [2 * intermediate, hidden]. w_out: [hidden, intermediate].
    """

    def __init__(
        self, hidden: int, intermediate: int, *, seed: int, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        w_in, w_out = _first_weights(hidden, intermediate, seed, expert=-1)
        self.w_in = nn.Parameter(w_in)
        self.w_out = nn.Parameter(w_out)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden] of any floating-point dtype. Returns [tokens, hidden] in the compute dtype."""
        dtype = self.compute_dtype
        return swiglu(x.to(dtype), self.w_in.to(dtype), self.w_out.to(dtype))


class RoutedExperts(nn.Module):
    """Some consecutive experts of a layer, which this rank alone holds.

    The first weights of an expert follow from `seed` and its global id, so the same model comes out on any number of
    ranks.

    Args:
        hidden, intermediate: channels of a token and of the inner layer.
        first_expert: global id of the first expert.
        num_experts: how many there are here.
        seed: of the first weights.
        compute_dtype: of the matrix products; parameters are float32.

    Attributes:
        w_in: [num_experts, 2 * intermediate, hidden]. w_out: [num_experts, hidden, intermediate].
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        first_expert: int,
        num_experts: int,
        seed: int,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        experts = range(first_expert, first_expert + num_experts)
        weights = [_first_weights(hidden, intermediate, seed, expert) for expert in experts]
        self.w_in = nn.Parameter(torch.stack([w_in for w_in, _ in weights]))
        self.w_out = nn.Parameter(torch.stack([w_out for _, w_out in weights]))
        self.compute_dtype = compute_dtype

    def forward(self, rows: Tensor, group_sizes: Sequence[int]) -> Tensor:
        """Run each expert on its group of rows.

        Args:
            rows: [sum(group_sizes), hidden] of any floating-point dtype, grouped by expert.
            group_sizes: rows of each expert, 0 allowed.

        Returns:
            [sum(group_sizes), hidden] in the compute dtype.
        """
        dtype = self.compute_dtype
        # unbind and not w[e]: the gradient of an index is a tensor of the size of all experts. Empty groups are
        # computed as well: their experts get a gradient of zero, and the graph is the same on all ranks.
        groups = zip(
            torch.split(rows.to(dtype), list(group_sizes)),
            self.w_in.to(dtype).unbind(),
            self.w_out.to(dtype).unbind(),
            strict=True,
        )
        return torch.cat([swiglu(group, w_in, w_out) for group, w_in, w_out in groups])


def _first_weights(hidden: int, intermediate: int, seed: int, expert: int) -> tuple[Tensor, Tensor]:
    """Normal values of variance 1 / fan-in, so that outputs have about the size of the inputs."""
    generator = torch.Generator().manual_seed((seed << 20) + expert + 1)
    w_in = torch.randn(2 * intermediate, hidden, generator=generator) * hidden**-0.5
    w_out = torch.randn(hidden, intermediate, generator=generator) * intermediate**-0.5
    return w_in, w_out
