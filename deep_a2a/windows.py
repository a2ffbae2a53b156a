"""Views of the own window, in whatever array library is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deep_a2a._cpu import Shape, regions
from deep_a2a.arrays import Library
from deep_a2a.formats import ITEM_BYTES


class WindowViews:
    """`wrap` makes all of the window a uint8 array that keeps it."""

    def __init__(self, shape: Shape, wrap: Callable[[Library], Any]) -> None:
        self._wrap = wrap
        self._memory: dict[str, Any] = {}  # by library
        self._views: dict[tuple[object, ...], Any] = {}  # all rows that fit
        self._regions = {row[0]: row for row in regions(shape)}

    def rows(
        self, library: Library, region: str, instance: int, shape: tuple[int, int], dtype: str, align: int = 1
    ) -> Any:
        """A view of `shape` in an instance of `region`, its rows in multiples of `align` bytes."""
        num_rows, columns = shape
        which = (library, region, instance, columns, dtype, align)
        if which not in self._views:
            if library.name not in self._memory:
                self._memory[library.name] = self._wrap(library)
            _, _, _, offset, stride, _ = self._regions[region]
            pitch = -(-columns * ITEM_BYTES[dtype] // align) * align
            full = (stride // pitch, columns)
            self._views[which] = library.rows(
                self._memory[library.name], offset + instance * stride, full, pitch, dtype
            )
        return library.first(self._views[which], num_rows)
