"""The arguments of dispatch and combine, checked: what remains is pointers, pitches and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deep_a2a._cpu import Cast, ScaleFormat
from deep_a2a.quant import FP8_DTYPES, FP8_FORMATS, SCALE_DTYPES, canonical_format, num_scale_groups

DispatchInput = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

# Of scales that are given. float8_e8m0fnu came to torch later than the others.
_E8M0: torch.dtype | None = getattr(torch, "float8_e8m0fnu", None)
_SCALE_DTYPES = (torch.float32, torch.uint8) if _E8M0 is None else (torch.float32, torch.uint8, _E8M0)


def describe(value: Any) -> str:
    """What came, for error messages. Contents only of plain values: anything else may hold tensors."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(map(describe, value))})"
    if value is None:
        return "None"
    if isinstance(value, (int, str, float, bool)):
        return f"{value!r} of type {type(value).__name__}"
    return f"an object of type {type(value).__name__}"


def check_tensor(
    name: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...], or_else: str = ""
) -> torch.Tensor:
    """`value` if it is a CPU tensor of one of `dtypes` and of `shape` (None: any size). Errors add `or_else`."""
    expected = f"a CPU tensor of {' or '.join(map(str, dtypes))} and shape {list(shape)}".replace("None", "any")
    expected += or_else
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")
    fits = value.dim() == len(shape) and all(
        want in (None, size) for want, size in zip(shape, value.shape, strict=True)
    )
    if value.device.type != "cpu" or value.dtype not in dtypes or not fits:
        raise ValueError(f"{name} must be {expected}, got {describe(value)}")
    return value


def check_contiguous(name: str, value: torch.Tensor) -> torch.Tensor:
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {value.stride()} for shape {tuple(value.shape)}")
    return value


def check_rows(name: str, value: torch.Tensor) -> torch.Tensor:
    """Rows may lie apart, but each must be contiguous."""
    if value.numel() and value.shape[1] > 1 and value.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous rows (last stride 1), got strides {value.stride()}")
    return value


@dataclass(frozen=True)
class Payload:
    """The input of a dispatch and the format in which it travels."""

    rows: torch.Tensor
    scales: torch.Tensor | None  # given with the rows; None when cast on the way, or without scales
    cast: Cast
    scale_format: ScaleFormat
    dtype: torch.dtype  # as it arrives
    scale_dtype: torch.dtype | None
    payload_bytes: int
    scale_bytes: int

    @property
    def num_tokens(self) -> int:
        return self.rows.shape[0]


def check_payload(x: DispatchInput, quantize: str | None, scale_format: str, hidden: int, max_tokens: int) -> Payload:
    """`x` as dispatch takes it. Raises TypeError or ValueError."""
    if not isinstance(scale_format, str) or scale_format not in SCALE_DTYPES:
        raise ValueError(f"scale_format must be one of {sorted(SCALE_DTYPES)}, got {describe(scale_format)}")
    if isinstance(x, tuple):
        if quantize is not None:
            raise ValueError(f"quantize must be None when x is (fp8, scales), got {describe(quantize)}")
        payload = _check_fp8(x, hidden)
    else:
        payload = _check_bf16(x, quantize, scale_format, hidden)
    if payload.num_tokens > max_tokens:
        raise ValueError(f"x must have at most num_max_tokens_per_rank = {max_tokens} tokens, got {payload.num_tokens}")
    if payload.payload_bytes % 16:
        raise ValueError(
            f"rows of x must be multiples of 16 bytes: hidden must be a multiple of 16 for FP8, got {hidden}"
        )
    return payload


def _check_bf16(x: torch.Tensor, quantize: str | None, scale_format: str, hidden: int) -> Payload:
    rows = check_rows("x", check_tensor("x", x, (torch.bfloat16,), (None, hidden), " or a pair (fp8, scales)"))
    if quantize is None:
        return Payload(rows, None, Cast.none, ScaleFormat.float32, rows.dtype, None, hidden * 2, 0)
    try:
        fmt = canonical_format(quantize)
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantize must be None, 'fp8', 'fp8_e4m3' or 'fp8_e5m2', got {describe(quantize)}") from error
    scale_dtype = SCALE_DTYPES[scale_format]
    scale_bytes = num_scale_groups(hidden) * scale_dtype.itemsize
    cast, scale_kind = getattr(Cast, fmt), getattr(ScaleFormat, scale_format)
    return Payload(rows, None, cast, scale_kind, FP8_DTYPES[fmt], scale_dtype, hidden, scale_bytes)


def _check_fp8(x: tuple[torch.Tensor, torch.Tensor], hidden: int) -> Payload:
    if len(x) != 2:
        raise TypeError(f"x must be a tensor or a pair (fp8, scales), got a tuple of {len(x)}")
    rows = check_rows("x[0]", check_tensor("x[0]", x[0], tuple(FP8_FORMATS), (None, hidden)))
    scale_shape = (rows.shape[0], num_scale_groups(hidden))
    scales = check_tensor("x[1] (scales)", x[1], _SCALE_DTYPES, scale_shape)
    check_rows("x[1] (scales)", scales)
    if scales.dtype == _E8M0:
        scales = scales.view(torch.uint8)
    scale_bytes = scale_shape[1] * scales.element_size()
    return Payload(rows, scales, Cast.none, ScaleFormat.float32, rows.dtype, scales.dtype, hidden, scale_bytes)


def check_routing(
    topk_idx: torch.Tensor | None, topk_weights: torch.Tensor | None, num_tokens: int, num_topk: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both as dispatch takes them; the values of `topk_idx` are checked natively, on every rank."""
    if topk_idx is None:
        raise ValueError("topk_idx must be given unless a handle is")
    shape = (num_tokens, num_topk)
    idx = check_contiguous("topk_idx", check_tensor("topk_idx", topk_idx, (torch.int32, torch.int64), shape))
    if topk_weights is None:
        return idx, None
    weights = check_tensor("topk_weights", topk_weights, (torch.float32,), shape)
    return idx, check_contiguous("topk_weights", weights)


def check_combine(
    x: torch.Tensor, shape: tuple[int, ...], side: torch.Tensor | None, side_shape: tuple[int, ...]
) -> None:
    """The rows and the side payload of combine."""
    check_contiguous("x", check_tensor("x", x, (torch.bfloat16,), shape))
    if side is not None:
        check_contiguous("side", check_tensor("side", side, (torch.float32,), side_shape))
