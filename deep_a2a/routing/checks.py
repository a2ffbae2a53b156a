"""Checks of arguments that several routing modules share."""

from __future__ import annotations

import torch


def require_int(name: str, value: int, minimum: int, maximum: int | None = None) -> None:
    """Raise unless ``value`` is an int within ``[minimum, maximum]``.

    Raises:
        TypeError: it is no int (bool counts as none).
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected an int")
    if value < minimum or (maximum is not None and value > maximum):
        limits = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
        raise ValueError(f"{name} is {value}, expected {limits}")


def require_divides(part_name: str, part: int, whole_name: str, whole: int) -> None:
    """Raise ValueError unless ``part`` divides ``whole``."""
    if whole % part:
        raise ValueError(f"{part_name} is {part}, expected a divisor of {whole_name} = {whole}")


def require_topk_idx(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Raise unless ``topk_idx`` is int32 or int64 ``[tokens, num_topk]`` with values from -1 to ``num_experts - 1``."""
    require_int("num_experts", num_experts, 1)
    if topk_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_idx has dtype {topk_idx.dtype}, expected torch.int32 or torch.int64")
    if topk_idx.dim() != 2:
        raise ValueError(f"topk_idx has shape {tuple(topk_idx.shape)}, expected [tokens, num_topk]")
    if topk_idx.numel() == 0:
        return
    low, high = (int(bound) for bound in topk_idx.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(f"topk_idx has values from {low} to {high}, expected -1 to {num_experts - 1}")
