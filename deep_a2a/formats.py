"""The formats of rows, by name: what they take, how FP8 rows are scaled. Needs no array library."""

from __future__ import annotations

from enum import Enum


class ScaleLayout(Enum):
    """How the scales of a result lie in memory."""

    row_major = "row_major"
    column_major = "column_major"


GROUP_CHANNELS = 128
"""Channels that share one scale."""

FP8_NAMES: dict[str, str] = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""The name of the dtype of each FP8 format, the same in torch and in ml_dtypes."""

SCALE_NAMES: dict[str, str] = {"float32": "float32", "ue8m0": "uint8"}
"""The name of the dtype in which the scales of each scale format come."""

SCALE_COLUMN_DTYPES: dict[str, str] = {"float32": "float32", "uint8": "int32"}
"""What holds scales of each dtype in layout column_major: they do, or a word four, the first in the lowest byte."""

COLUMN_WORD_BYTES = 4

ITEM_BYTES: dict[str, int] = {
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float32": 4,
    "int32": 4,
    "uint8": 1,
}
"""Bytes of an element of what dispatch and combine return."""

_FORMAT_ALIASES = {"fp8": "fp8_e4m3"}


def canonical_format(fmt: str) -> str:
    """Resolve the alias ``"fp8"`` and check the name of an FP8 format.

    Returns:
        A key of `FP8_NAMES`.

    Raises:
        ValueError: ``fmt`` is not the name of a format.
    """
    name = _FORMAT_ALIASES.get(fmt, fmt)
    if name not in FP8_NAMES:
        known = ", ".join(repr(each) for each in (*FP8_NAMES, *_FORMAT_ALIASES))
        raise ValueError(f"fmt is {fmt!r}, expected one of {known}")
    return name


def num_scale_groups(hidden: int) -> int:
    """How many scales a row of ``hidden`` channels has: one for each 128, the last group may be shorter."""
    if hidden < 1:
        raise ValueError(f"hidden is {hidden}, expected at least 1")
    return -(-hidden // GROUP_CHANNELS)
