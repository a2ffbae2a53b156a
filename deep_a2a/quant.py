"""FP8 with one scale per token and 128 channels: the casts that dispatch does, in plain torch.

Every operation is one float32 torch operation with one rounding, so that another implementation of the same formulas
can be compared with this one bit by bit. With ``MAX`` the largest value of the FP8 format:

- ``amax`` = the largest magnitude of the group, NaN ignored, and at least 2^-96: the inverse of a group of zeros is
  finite.
- scale format ``float32``: ``scale = amax / MAX``, ``q = cast(x * (MAX / amax))``.
- scale format ``ue8m0``: ``scale`` = ``amax / MAX`` rounded up to a power of two, stored as its exponent + 127 in one
  byte; ``q = cast(x / scale)``.
- ``cast`` rounds to nearest even, saturates to +-MAX, keeps the sign of zero, and turns every NaN into the byte 0x7F.

An infinity takes its group with it. ``float32``: the scale is infinite, the infinity becomes NaN and all others zero.
``ue8m0``: the scale is the largest (2^127), the infinity becomes +-MAX, and what is small beside 2^127 becomes zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deep_a2a.formats import (
    COLUMN_WORD_BYTES,
    FP8_NAMES,
    GROUP_CHANNELS,
    SCALE_NAMES,
    canonical_format,
    num_scale_groups,
)

__all__ = [
    "FP8_DTYPES",
    "FP8_FORMATS",
    "FP8_MAX",
    "GROUP_CHANNELS",
    "SCALE_DTYPES",
    "canonical_format",
    "dequantize",
    "num_scale_groups",
    "quantize",
]

FP8_DTYPES: dict[str, torch.dtype] = {fmt: getattr(torch, name) for fmt, name in FP8_NAMES.items()}
"""The torch dtype of each format name."""

FP8_FORMATS: dict[torch.dtype, str] = {dtype: fmt for fmt, dtype in FP8_DTYPES.items()}
"""The format name of each torch dtype."""

FP8_MAX: dict[str, float] = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
"""The largest finite value of each format."""

SCALE_DTYPES: dict[str, torch.dtype] = {fmt: getattr(torch, name) for fmt, name in SCALE_NAMES.items()}
"""The dtype in which `quantize` returns the scales of each scale format."""

_AMAX_FLOOR = 2.0**-96
_NAN_BYTE = 0x7F
_UE8M0_LARGEST = 254  # 2^127; the byte 255 means NaN
_MANTISSA_BITS = 23


def quantize(
    x: torch.Tensor, fmt: str = "fp8_e4m3", scale_format: str = "float32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast rows to FP8 with one scale per row and 128 channels (formulas: see the module).

    Args:
        x: bfloat16 or float32 ``[..., hidden]``, any strides. No gradient flows through the cast.
        fmt: ``"fp8_e4m3"`` (``"fp8"`` is the same) or ``"fp8_e5m2"``.
        scale_format: ``"float32"`` or ``"ue8m0"`` (powers of two).

    Returns:
        ``(q, scales)``: ``q`` float8_e4m3fn or float8_e5m2 ``[..., hidden]``; ``scales`` ``[..., ceil(hidden / 128)]``,
        float32, or uint8 (exponent + 127) for ``"ue8m0"``. Both contiguous.

    Raises:
        TypeError: ``x`` has another dtype.
        ValueError: ``x`` has no channels, or ``fmt`` or ``scale_format`` is unknown.
    """
    fmt = canonical_format(fmt)
    if scale_format not in SCALE_DTYPES:
        raise ValueError(f"scale_format is {scale_format!r}, expected one of {', '.join(map(repr, SCALE_DTYPES))}")
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"x has dtype {x.dtype}, expected torch.bfloat16 or torch.float32")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., hidden] with hidden at least 1")

    hidden = x.shape[-1]
    with torch.no_grad():
        groups = _to_groups(x.float())
        magnitude = groups.abs().masked_fill_(groups.isnan(), 0.0)
        amax = magnitude.amax(dim=-1, keepdim=True).clamp_(min=_AMAX_FLOOR)
        # A tensor, not a Python number: torch divides a number by a tensor, and on a GPU a tensor by a number, through
        # a reciprocal, which rounds twice.
        largest = torch.full_like(amax, FP8_MAX[fmt])
        if scale_format == "float32":
            scales = amax / largest
            scaled = groups * (largest / amax)
        else:
            scales = _round_up_to_ue8m0(amax / largest)
            scaled = groups / _ue8m0_to_float(scales)
        q = _cast(scaled, fmt).flatten(-2)[..., :hidden].contiguous()
        return q, scales.squeeze(-1).contiguous()


def dequantize(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Multiply FP8 rows by their scales: ``q * scale`` in float32, then one rounding to ``dtype``. NaN stays NaN.

    Args:
        q: float8_e4m3fn or float8_e5m2 ``[..., hidden]``.
        scales: ``[..., ceil(hidden / 128)]``, float32, or uint8 / float8_e8m0fnu for powers of two, or
            ``[..., ceil(hidden / 512)]``, int32, four of these powers each, the first in the lowest byte.
        dtype: the floating-point dtype of the result.

    Returns:
        ``dtype`` ``[..., hidden]``.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: the shape of ``scales`` does not fit that of ``q``.
    """
    if q.dtype not in FP8_FORMATS:
        raise TypeError(f"q has dtype {q.dtype}, expected {' or '.join(map(str, FP8_FORMATS))}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}, expected a floating-point dtype")
    if q.dim() < 1 or q.shape[-1] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected [..., hidden] with hidden at least 1")
    hidden = q.shape[-1]
    num_groups = num_scale_groups(hidden)
    packed = scales.dtype == torch.int32
    expected_shape = (*q.shape[:-1], -(-num_groups // COLUMN_WORD_BYTES) if packed else num_groups)
    if tuple(scales.shape) != expected_shape:
        raise ValueError(f"scales has shape {tuple(scales.shape)}, expected {expected_shape} for q {tuple(q.shape)}")
    if packed:
        scales = _unpack_ue8m0(scales)[..., :num_groups]
    # float8_e8m0fnu came to torch later than the other dtypes, hence not named at import.
    if scales.dtype == torch.uint8 or scales.dtype == getattr(torch, "float8_e8m0fnu", None):
        scales = _ue8m0_to_float(scales.view(torch.uint8))
    elif scales.dtype != torch.float32:
        expected = "torch.float32, torch.uint8, torch.float8_e8m0fnu or torch.int32"
        raise TypeError(f"scales has dtype {scales.dtype}, expected {expected}")
    groups = _to_groups(q.float())
    return (groups * scales.unsqueeze(-1)).flatten(-2)[..., :hidden].to(dtype).contiguous()


def _to_groups(x: torch.Tensor) -> torch.Tensor:
    """``[..., hidden]`` to ``[..., groups, 128]``; the zeros that fill the last group change no maximum."""
    num_groups = num_scale_groups(x.shape[-1])
    padding = num_groups * GROUP_CHANNELS - x.shape[-1]
    if padding:
        x = F.pad(x, (0, padding))
    return x.reshape(*x.shape[:-1], num_groups, GROUP_CHANNELS)


def _cast(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """Round to nearest even, saturating: torch's own cast saturates in some versions and formats, and not in others."""
    largest = FP8_MAX[fmt]
    q = x.clamp(-largest, largest).to(FP8_DTYPES[fmt])
    q.view(torch.uint8).masked_fill_(x.isnan(), _NAN_BYTE)
    return q


def _round_up_to_ue8m0(ratio: torch.Tensor) -> torch.Tensor:
    """Exponent byte of the smallest power of two that is not below ``ratio``, a positive normal float32 or +inf."""
    bits = ratio.view(torch.int32)
    has_mantissa = (bits & ((1 << _MANTISSA_BITS) - 1)) != 0
    exponent = (bits >> _MANTISSA_BITS) + has_mantissa.to(torch.int32)
    return exponent.clamp_(max=_UE8M0_LARGEST).to(torch.uint8)


def _unpack_ue8m0(words: torch.Tensor) -> torch.Tensor:
    """int32 ``[..., words]`` to uint8 ``[..., 4 * words]``, the lowest byte first."""
    shifts = torch.arange(0, 8 * COLUMN_WORD_BYTES, 8, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> shifts).bitwise_and_(0xFF).to(torch.uint8).flatten(-2)


def _ue8m0_to_float(exponent: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127) as float32; the byte 0 is the subnormal 2^-127, the byte 255 is NaN."""
    bits = exponent.to(torch.int32) << _MANTISSA_BITS
    bits = bits.masked_fill(exponent == 0, 1 << (_MANTISSA_BITS - 1))
    bits = bits.masked_fill(exponent == 255, 0x7FC00000)
    return bits.view(torch.float32)
