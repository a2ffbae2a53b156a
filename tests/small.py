"""A small buffer, a short call, and what calls raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from backends import device_of, let_arrive

import deep_a2a

SMALL: dict[str, Any] = {
    "hidden": 16,
    "num_experts": 16,
    "num_topk": 2,
    "num_max_tokens_per_rank": 4,
    "timeout_s": 30.0,
}


def send_ones(buffer: deep_a2a.Buffer, value: float = 1.0, **modes: Any) -> deep_a2a.DispatchResult:
    """Two tokens of `value`, to the first expert of this rank and of the next."""
    local = buffer.num_experts // buffer.num_ranks
    device = device_of(buffer.backend)
    idx = torch.tensor([[buffer.rank * local, (buffer.rank + 1) % buffer.num_ranks * local]] * 2, device=device)
    x = torch.full((2, buffer.hidden), value, dtype=torch.bfloat16, device=device)
    result = buffer.dispatch(x, idx, **modes)
    let_arrive(buffer.backend)
    return result


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    """Type and message of what the call raises; ("", "") if it returns."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""
