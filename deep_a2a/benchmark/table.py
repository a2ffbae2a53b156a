"""Records as tables for people: operations, what they do between nodes, communication beside computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deep_a2a.benchmark.record import LINK_CLASSES, Record

LEGEND = """\
ranks                  nodes x ranks of a node
wire bytes             rows that leave or enter the busiest rank, by link class (network: between nodes)
logical, GB/s          rows that the busiest rank receives, its own included; GB/s = logical / total us
total us, baseline us  of the slowest rank, median; baseline: all_to_all_single; speed-up = baseline us / total us
link ratio             total us / the time that the slowest link class takes at the speed measured beside it
of link                wire bytes of the slowest link class / total us, as a share of that speed
limit                  nodes that a token may go to
network, node          bytes and rates (bytes / total us) of the busiest rank: between nodes, and within its node
ceiling, same SMs      what plain puts carry between nodes: the fastest way, and on no more SMs than the operation has
network ratio          total us / the time that the network's bytes take at its ceiling
headers                bytes put beside the rows that have to cross, one for each token and other node: share of these
hidden                 of communication's time, what does not show beside the products: gemm alone + comm alone - both
More in bench/README.md."""

_Column = tuple[str, Callable[[Record], str]]
_WHAT: tuple[_Column, ...] = (
    ("op", lambda r: r.op),
    ("dtype", lambda r: r.dtype),
    ("layout", lambda r: r.layout),
    ("ranks", lambda r: f"{r.num_nodes}x{r.ranks_per_node}"),
    ("routing", lambda r: r.routing),
    ("mode", lambda r: _mode(r)),
)
_SIZE: tuple[_Column, ...] = (
    ("tokens", lambda r: str(r.num_tokens)),
    ("SMs", lambda r: _number(r.num_sms, "d")),
)
_OPERATION: tuple[_Column, ...] = (
    ("total us", lambda r: _microseconds(r)),
    ("baseline us", lambda r: _number(r.baseline_us, ".0f")),
    ("speed-up", lambda r: _number(r.speedup, ".2f")),
    ("logical", lambda r: _bytes(r.logical_bytes)),
    ("GB/s", lambda r: f"{r.logical_gbs:.2f}"),
    ("per SM", lambda r: _number(r.gbs_per_sm, ".2f")),
    ("link ratio", lambda r: _number(r.link_time_ratio, ".2f")),
    ("of link", lambda r: _number(r.link_efficiency, ".0%")),
    ("checked", lambda r: "yes" if r.checked else "no"),
)
_NETWORK: tuple[_Column, ...] = (
    ("limit", lambda r: _number(r.topk_groups, "d")),
    ("total us", lambda r: _microseconds(r)),
    ("network", lambda r: _bytes(r.wire_bytes.network)),
    ("GB/s", lambda r: f"{r.network_gbs:.2f}"),
    ("ceiling", lambda r: _number(r.network_ceiling_gbs, ".2f")),
    ("same SMs", lambda r: _number(r.network_ceiling_at_sms_gbs, ".2f")),
    ("network ratio", lambda r: _number(r.network_ratio, ".2f")),
    ("headers", lambda r: _number(r.network_header_share, ".2%")),
    ("node", lambda r: _bytes(r.wire_bytes.nvlink + r.wire_bytes.shm)),
    ("GB/s", lambda r: f"{(r.wire_bytes.nvlink + r.wire_bytes.shm) / r.total_us / 1e3:.2f}"),
)
_OVERLAP: tuple[_Column, ...] = (
    ("gemm alone us", lambda r: _number(r.gemm_alone_us, ".0f")),
    ("gemm beside us", lambda r: _number(r.gemm_beside_us, ".0f")),
    ("comm alone us", lambda r: _number(r.comm_alone_us, ".0f")),
    ("both us", lambda r: _number(r.both_us, ".0f")),
    ("hidden", lambda r: _number(r.share_hidden, ".1%")),
    ("gemm slower by", lambda r: _number(r.gemm_slowdown, ".1%")),
    ("checked", lambda r: "yes" if r.checked else "no"),
)


def format_table(records: Sequence[Record]) -> str:
    """One line a record; those of op "overlap" in a table of their own, those of several nodes in one more."""
    operations = [record for record in records if record.op != "overlap"]
    overlaps = [record for record in records if record.op == "overlap"]
    tables = []
    if operations:
        tables.append(_format(operations, (*_WHAT, ("wire bytes", _wire)), (*_SIZE, *_OPERATION)))
    across = [record for record in operations if record.num_nodes > 1]
    if across:
        tables.append(_format(across, _WHAT, (*_SIZE, *_NETWORK)))
    if overlaps:
        tables.append(_format(overlaps, (*_WHAT, ("products", lambda r: r.gemm or "")), (*_SIZE, *_OVERLAP)))
    return "\n\n".join(tables)


def _format(records: Sequence[Record], left: Sequence[_Column], right: Sequence[_Column]) -> str:
    columns = (*left, *right)
    rows = [tuple(name for name, _ in columns), *(tuple(value(record) for _, value in columns) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = []
    for row in rows:
        texts = [text.ljust(width) for text, width in zip(row[: len(left)], widths, strict=False)]
        numbers = [text.rjust(width) for text, width in zip(row[len(left) :], widths[len(left) :], strict=True)]
        lines.append("  ".join([*texts, *numbers]).rstrip())
    return "\n".join(lines)


def _mode(record: Record) -> str:
    parts = ["cached" if record.cached else "counted", record.output, record.input]
    parts += ["graph"] if record.graph else []
    parts += ["host sync"] if record.host_sync else []
    return " ".join(parts)


def _microseconds(record: Record) -> str:
    return f"{record.total_us:.0f}" if record.total_us >= 1000 else f"{record.total_us:.1f}"


def _wire(record: Record) -> str:
    counts = [(name, getattr(record.wire_bytes, name)) for name in LINK_CLASSES]
    return ", ".join(f"{name} {_bytes(count)}" for name, count in counts if count) or "none"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
