"""Tables, as text for a terminal and as Markdown for the documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `left` columns, and the last one if `notes`, are aligned to the left."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    notes: bool = False

    def text(self) -> str:
        widths = [max(len(row[column]) for row in (self.header, *self.rows)) for column in range(len(self.header))]
        lines = [self._line(row, widths) for row in (self.header, tuple("-" * width for width in widths), *self.rows)]
        return "\n".join(lines)

    def markdown(self) -> str:
        rule = ("---" if self._is_left(column) else "--:" for column in range(len(self.header)))
        return "\n".join("| " + " | ".join(row) + " |" for row in (self.header, tuple(rule), *self.rows))

    def _is_left(self, column: int) -> bool:
        return column < self.left or (self.notes and column == len(self.header) - 1)

    def _line(self, row: tuple[str, ...], widths: list[int]) -> str:
        cells = [
            cell.ljust(width) if self._is_left(column) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()


def decimal_bytes(count: float) -> str:
    """Powers of 1000, three digits or more: ``decimal_bytes(1500) == "1.5 kB"``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def binary_bytes(count: float) -> str:
    """Powers of 1024: ``binary_bytes(1536) == "1.5 KiB"``."""
    if count < 1000:
        return f"{count:.0f} B"
    value = count / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def microseconds(value: float) -> str:
    """A decimal below 100."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
