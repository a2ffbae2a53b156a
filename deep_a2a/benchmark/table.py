"""Records as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from deep_a2a.benchmark.record import LINK_CLASSES, Record

_COLUMNS = (
    "op", "dtype", "layout", "topology", "routing", "mode", "wire bytes", "logical", "total us", "baseline us",
    "speed-up", "GB/s", "link ratio", "checked",
)  # fmt: skip
_NUM_TEXT_COLUMNS = 7

LEGEND = """\
topology               nodes x ranks of a node
wire bytes             rows that leave or enter the busiest rank, by link class (network: between nodes)
logical, GB/s          rows that the busiest rank receives, its own included; GB/s = logical / total us
total us, baseline us  of the slowest rank, median; baseline: all_to_all_single; speed-up = baseline us / total us
link ratio             total us / the time that the busiest link class takes at the speed measured beside it
More in bench/README.md."""


def format_table(records: Sequence[Record]) -> str:
    """One line a record. Bytes are those of the busiest rank; GB/s are logical bytes over total time."""
    rows = [_COLUMNS, *(_cells(record) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join("  ".join(map(_align, row, widths, range(len(row)))).rstrip() for row in rows)


def _cells(record: Record) -> tuple[str, ...]:
    mode = ("cached" if record.cached else "counted", record.output, record.input)
    wire = [(name, getattr(record.wire_bytes, name)) for name in LINK_CLASSES]
    return (
        record.op,
        record.dtype,
        record.layout,
        f"{record.num_ranks // record.ranks_per_node}x{record.ranks_per_node}",
        record.routing,
        " ".join(mode),
        ", ".join(f"{name} {_bytes(count)}" for name, count in wire if count) or "none",
        _bytes(record.logical_bytes),
        f"{record.total_us:.0f}",
        _number(record.baseline_us, ".0f"),
        _number(record.speedup, ".2f"),
        f"{record.logical_gbs:.2f}",
        _number(record.link_time_ratio, ".2f"),
        "yes" if record.checked else "no",
    )


def _align(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column < _NUM_TEXT_COLUMNS else text.rjust(width)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
