"""Scales by column: memory of the result's own, in the layout that TMA descriptors and grouped GEMMs want."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deep_a2a.formats import COLUMN_WORD_BYTES, SCALE_COLUMN_DTYPES

if TYPE_CHECKING:
    from deep_a2a.backend import Backend, DispatchRequest

_TMA_WORDS = 16 // COLUMN_WORD_BYTES  # a TMA descriptor takes strides in whole 16 bytes


@dataclass(frozen=True)
class ColumnScales:
    """`value` is what the result gets: [rows, columns], in layout "padded" [experts, capacity, columns]."""

    value: Any
    pointer: int
    pitch: int  # words from one column to the next

    @classmethod
    def for_request(cls, backend: Backend, request: DispatchRequest, num_rows: int) -> ColumnScales | None:
        """For `num_rows` rows of all experts; None where scales stay in rows."""
        payload = request.payload
        if payload.scale_dtype is None or request.row_scale_dtype is not None:
            return None
        groups: tuple[int, ...] = ()
        if backend.settings.layout == "padded":
            groups = (backend.shape.num_local_experts,)
            num_rows //= groups[0]
        num_columns = -(-payload.scale_bytes // COLUMN_WORD_BYTES)
        pitch = -(-num_rows // _TMA_WORDS) * _TMA_WORDS
        dtype = SCALE_COLUMN_DTYPES[payload.scale_dtype]
        block = payload.library.empty((*groups, num_columns, pitch), dtype, backend.device)
        pointer = payload.library.pointer(block)
        return cls(block.swapaxes(-1, -2)[..., :num_rows, :], pointer, pitch)


def pointer_and_pitch(columns: ColumnScales | None) -> tuple[int, int]:
    """As native code takes them: null where scales stay in rows."""
    return (0, 0) if columns is None else (columns.pointer, columns.pitch)
