"""The arguments of dispatch and combine, checked: what remains is pointers, pitches and sizes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deep_a2a._cpu import Cast, ScaleFormat
from deep_a2a.arrays import Array, Device, Library, as_array
from deep_a2a.formats import FP8_NAMES, ITEM_BYTES, SCALE_NAMES, ScaleLayout, canonical_format, num_scale_groups
from deep_a2a.numpy_arrays import STAND_INS

if TYPE_CHECKING:
    import torch

    DispatchInput = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_FP8 = tuple(FP8_NAMES.values())
_E8M0 = "float8_e8m0fnu"
_SCALES = ("float32", "uint8", _E8M0)
_SCALE_LAYOUTS = {layout.value: layout for layout in ScaleLayout}


def describe(value: Any) -> str:
    """What came, for error messages. Contents only of plain values: anything else may hold tensors."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(map(describe, value))})"
    if value is None:
        return "None"
    if isinstance(value, (int, str, float, bool)):
        return f"{value!r} of type {type(value).__name__}"
    return f"an object of type {type(value).__name__}"


def check_array(
    name: str, value: Any, dtypes: tuple[str, ...], shape: tuple[int | None, ...], device: Device, or_else: str = ""
) -> Array:
    """`value` if it is an array of one of `dtypes`, of `shape` (None as the first: any size) and on `device`."""
    array = as_array(value)
    if array is not None:
        array = _spelled_out(array, dtypes)
        expected_shape = (*array.shape[:1], *shape[1:]) if shape[0] is None else shape
        if array.dtype in dtypes and array.device == device and array.shape == expected_shape:
            return array
    sizes = str(list(shape)).replace("None", "any")
    place = "CPU tensor" if device.kind == "cpu" else f"tensor on {device}"
    expected = f"a {place} of {' or '.join(dtypes)} and shape {sizes}{or_else}"
    if array is None:
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")
    got = f"a {array.library.name} array of {array.dtype} and shape {array.shape} on {array.device}"
    raise ValueError(f"{name} must be {expected}, got {got if array.library.name != 'torch' else describe(value)}")


def _spelled_out(array: Array, dtypes: tuple[str, ...]) -> Array:
    """Where a dtype stands for one that the library does not have, as that one."""
    if array.library.name == "torch" or array.dtype in dtypes:
        return array
    meant = [dtype for dtype in dtypes if STAND_INS.get(dtype) == array.dtype]
    return replace(array, dtype=meant[0]) if meant else array


def check_contiguous(name: str, array: Array) -> Array:
    if not array.is_contiguous:
        raise ValueError(f"{name} must be contiguous, got strides {array.item_strides} for shape {array.shape}")
    return array


def check_rows(name: str, array: Array) -> Array:
    """Rows may lie apart, but each must be contiguous."""
    if 0 not in array.shape and array.shape[1] > 1 and array.strides[1] != array.item_bytes:
        raise ValueError(f"{name} must have contiguous rows (last stride 1), got strides {array.item_strides}")
    return array


@dataclass(frozen=True)
class Payload:
    """The input of a dispatch and the format in which it travels."""

    rows: Array
    scales: Array | None  # given with the rows; None when cast on the way, or without scales
    cast: Cast
    scale_format: ScaleFormat
    dtype: str  # as it arrives
    scale_dtype: str | None
    payload_bytes: int
    scale_bytes: int

    @property
    def num_tokens(self) -> int:
        return self.rows.shape[0]

    @property
    def library(self) -> Library:
        """Of the results too."""
        return self.rows.library

    @property
    def scale_columns(self) -> int:
        return 0 if self.scale_dtype is None else self.scale_bytes // ITEM_BYTES[self.scale_dtype]

    @property
    def format_code(self) -> int:
        """A number that ranks compare: equal for equal dtypes of rows and scales."""
        rows = ("bfloat16", *_FP8).index(self.dtype)
        scales = (None, "float32", "uint8").index(self.scale_dtype)
        return rows * 4 + scales


def check_payload(
    x: Any, quantize: str | None, scale_format: str, hidden: int, max_tokens: int, device: Device
) -> Payload:
    """`x` as dispatch takes it. Raises TypeError or ValueError."""
    if not isinstance(scale_format, str) or scale_format not in SCALE_NAMES:
        raise ValueError(f"scale_format must be one of {sorted(SCALE_NAMES)}, got {describe(scale_format)}")
    if isinstance(x, tuple):
        if quantize is not None:
            raise ValueError(f"quantize must be None when x is (fp8, scales), got {describe(quantize)}")
        payload = _check_fp8(x, hidden, device)
    else:
        payload = _check_bf16(x, quantize, scale_format, hidden, device)
    if payload.num_tokens > max_tokens:
        raise ValueError(f"x must have at most num_max_tokens_per_rank = {max_tokens} tokens, got {payload.num_tokens}")
    if payload.payload_bytes % 16:
        raise ValueError(
            f"rows of x must be multiples of 16 bytes: hidden must be a multiple of 16 for FP8, got {hidden}"
        )
    return payload


def _check_bf16(x: Any, quantize: str | None, scale_format: str, hidden: int, device: Device) -> Payload:
    rows = check_rows("x", check_array("x", x, ("bfloat16",), (None, hidden), device, " or a pair (fp8, scales)"))
    if quantize is None:
        return Payload(rows, None, Cast.none, ScaleFormat.float32, rows.dtype, None, hidden * 2, 0)
    try:
        fmt = canonical_format(quantize)
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantize must be None, 'fp8', 'fp8_e4m3' or 'fp8_e5m2', got {describe(quantize)}") from error
    scale_dtype = SCALE_NAMES[scale_format]
    scale_bytes = num_scale_groups(hidden) * ITEM_BYTES[scale_dtype]
    cast, scale_kind = getattr(Cast, fmt), getattr(ScaleFormat, scale_format)
    return Payload(rows, None, cast, scale_kind, FP8_NAMES[fmt], scale_dtype, hidden, scale_bytes)


def _check_fp8(x: tuple[Any, ...], hidden: int, device: Device) -> Payload:
    if len(x) != 2:
        raise TypeError(f"x must be a tensor or a pair (fp8, scales), got a tuple of {len(x)}")
    rows = check_rows("x[0]", check_array("x[0]", x[0], _FP8, (None, hidden), device))
    scale_shape = (rows.shape[0], num_scale_groups(hidden))
    scales = check_rows("x[1] (scales)", check_array("x[1] (scales)", x[1], _SCALES, scale_shape, device))
    if scales.dtype == _E8M0:
        scales = replace(scales, dtype="uint8")
    scale_bytes = scale_shape[1] * scales.item_bytes
    return Payload(rows, scales, Cast.none, ScaleFormat.float32, rows.dtype, scales.dtype, hidden, scale_bytes)


def check_scale_layout(scale_layout: Any, payload: Payload) -> ScaleLayout:
    """Of the scales of `payload` in the result."""
    chosen = _SCALE_LAYOUTS.get(scale_layout) if isinstance(scale_layout, str) else None
    if chosen is None:
        raise ValueError(f"scale_layout must be one of {list(_SCALE_LAYOUTS)}, got {describe(scale_layout)}")
    if chosen is not ScaleLayout.row_major and payload.scale_dtype is None:
        raise ValueError(
            f"scale_layout must be 'row_major' where rows arrive without scales ({payload.dtype}: FP8 has some, see "
            f"quantize), got {describe(scale_layout)}"
        )
    return chosen


def check_routing(
    topk_idx: Any, topk_weights: Any, num_tokens: int, num_topk: int, device: Device
) -> tuple[Array, Array | None]:
    """Both as dispatch takes them; the values of `topk_idx` are checked natively, on every rank."""
    if topk_idx is None:
        raise ValueError("topk_idx must be given unless a handle is")
    shape = (num_tokens, num_topk)
    idx = check_contiguous("topk_idx", check_array("topk_idx", topk_idx, ("int32", "int64"), shape, device))
    if topk_weights is None:
        return idx, None
    weights = check_array("topk_weights", topk_weights, ("float32",), shape, device)
    return idx, check_contiguous("topk_weights", weights)


def check_combine(
    x: Any, shape: tuple[int, ...], side: Any, side_shape: tuple[int, ...], device: Device
) -> tuple[Array, Array | None]:
    """The rows and the side payload of combine."""
    rows = check_contiguous("x", check_array("x", x, ("bfloat16",), shape, device))
    if side is None:
        return rows, None
    return rows, check_contiguous("side", check_array("side", side, ("float32",), side_shape, device))
