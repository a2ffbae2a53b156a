"""Load of the experts: count it, measure its balance, and even it out by a bias."""

from __future__ import annotations

import math

import torch

from .checks import require_topk_idx


def expert_load(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count the tokens of each expert in one ``topk_idx``; `DispatchResult.expert_load` has the sum over all ranks.

    Args:
        topk_idx: int32 or int64 ``[tokens, num_topk]``, global expert ids, -1 = no expert.
        num_experts: global number of experts.

    Returns:
        int64 ``[num_experts]``.

    Raises:
        TypeError, ValueError: an argument is out of range or of the wrong kind; the message names it.
    """
    require_topk_idx(topk_idx, num_experts)
    # Slots without an expert go to a counter of their own in front, so that no shape depends on the values.
    return torch.bincount(topk_idx.flatten().long() + 1, minlength=num_experts + 1)[1:]


def load_balance(load: torch.Tensor) -> float:
    """Largest load over mean load: 1.0 is perfect balance, ``len(load)`` is everything in one place.

    Args:
        load: counts ``[n]`` of any integer or floating-point dtype, of experts, ranks or nodes. All zero counts as
            balanced.

    Raises:
        ValueError: ``load`` is not a vector of at least one element.
    """
    if load.dim() != 1 or load.numel() == 0:
        raise ValueError(f"load has shape {tuple(load.shape)}, expected [n] with n at least 1")
    counts = load.double()
    mean = counts.mean().item()
    return counts.max().item() / mean if mean else 1.0


@torch.no_grad()
def update_bias(bias: torch.Tensor, load: torch.Tensor, speed: float) -> None:
    """Move each expert's selection bias one step against its load, in place: no auxiliary loss is needed for balance.

    ``bias += speed * sign(mean(load) - load)``: an overloaded expert loses ``speed``, an underloaded one gains it. This
    is the balancing of the DeepSeek-V3 technical report (arXiv 2412.19437, section 2.1.2), done once per training step.
    The sign is found in integers, so every rank that has the same load gets the same bias.

    Args:
        bias: float32 ``[num_experts]``, see `Gate.expert_bias`.
        load: int32 or int64 ``[num_experts]``, tokens routed to each expert **by all ranks**, as in
            `DispatchResult.expert_load`, summed over the micro-batches of the step.
        speed: size of the step, in units of the score (0.001 in the report).

    Raises:
        TypeError: ``bias`` or ``load`` has another dtype.
        ValueError: the shapes differ, or ``speed`` is negative or not finite.
    """
    if bias.dtype != torch.float32:
        raise TypeError(f"bias has dtype {bias.dtype}, expected torch.float32 (a step is lost in less)")
    if load.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"load has dtype {load.dtype}, expected torch.int32 or torch.int64")
    if bias.dim() != 1 or bias.shape != load.shape:
        raise ValueError(f"load has shape {tuple(load.shape)}, bias {tuple(bias.shape)}, expected both [num_experts]")
    if not math.isfinite(speed) or speed < 0:
        raise ValueError(f"speed is {speed}, expected a finite number of at least 0")
    counts = load.long()
    direction = (counts.sum() - counts * counts.numel()).sign()
    bias.add_(direction.to(device=bias.device, dtype=bias.dtype), alpha=speed)
