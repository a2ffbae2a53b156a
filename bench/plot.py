"""Draws a result file: on GPUs bandwidth over SMs and over tokens, with the link's ceiling; else times and baselines.

Of several nodes: bandwidth of the network over SMs, with its ceiling, and bytes and times over the node limit.

    python bench/plot.py bench/results/cpu.json [PNG]

Needs matplotlib: pip install 'deep-a2a[bench]'.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from deep_a2a.benchmark.record import Record, ResultFile

Curve = list[tuple[int, float]]

USUAL_SMS = 12


def label(record: Record) -> str:
    """What tells a record from the others of its file."""
    parts = [
        record.op,
        record.dtype,
        record.layout,
        f"{record.num_nodes}x{record.ranks_per_node}",
    ]
    if record.routing != "uniform":
        parts.append(record.routing)
    if record.topk_groups is not None:
        parts.append(f"{record.topk_groups} node(s) a token")
    if record.cached:
        parts.append("cached")
    if record.op == "dispatch" and record.output == "owned":
        parts.append("owned")
    if record.input == "copied":
        parts.append("copied")
    return " ".join(parts)


def curves(
    records: Iterable[Record],
    along: Callable[[Record], int | None],
    fixed: Callable[[Record], Any],
    value: Callable[[Record], float] = lambda record: record.wire_gbs,
    usual: Any = None,
) -> tuple[Any, dict[str, Curve]]:
    """`value` (wire GB/s) by what `along` gives, a curve for each payload and layout; curves of one point are left out.

    Of plain records only: uniform routing, nothing cached or copied. `fixed` is what else may not change, in any of the
    curves: of several values that with the most points, of several such `usual`. It is returned, too.
    """
    by_fixed: dict[Any, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in records:
        at = along(record)
        plain = record.routing == "uniform" and record.input == "lent" and not (record.cached or record.host_sync)
        if at is None or not plain or record.graph or (record.op == "dispatch" and record.output == "owned"):
            continue
        payload = "bf16" if record.op == "combine" else record.dtype  # what combine moves, whatever came
        by_fixed[fixed(record)][f"{record.op} {payload} {record.layout}"][at].append(value(record))
    drawn = {
        which: {
            name: [(at, statistics.median(values[at])) for at in sorted(values)]
            for name, values in sorted(points.items())
            if len(values) > 1
        }
        for which, points in by_fixed.items()
    }
    chosen = max(
        drawn, key=lambda which: (sum(len(curve) for curve in drawn[which].values()), which == usual), default=None
    )
    return chosen, drawn.get(chosen, {})


def draw_bandwidth(records: Sequence[Record], figure: Any) -> None:
    """Over SMs at one number of tokens, and over tokens at one number of SMs, where there are curves."""
    most_tokens = max(record.num_tokens for record in records)
    num_tokens, over_sms = curves(records, lambda r: r.num_sms, lambda r: r.num_tokens, usual=most_tokens)
    num_sms, over_tokens = curves(records, lambda r: r.num_tokens, lambda r: r.num_sms, usual=USUAL_SMS)
    sides = [("SMs", f"{num_tokens} tokens per rank", over_sms), ("tokens per rank", f"{num_sms} SMs", over_tokens)]
    sides = [side for side in sides if side[2]]
    best = max((r for r in records if r.ceiling_gbs is not None), key=lambda r: r.ceiling_gbs or 0, default=None)
    for axes, (along, at, drawn) in zip(
        figure.subplots(1, len(sides), sharey=True, squeeze=False)[0], sides, strict=True
    ):
        if along != "SMs":
            axes.set_xscale("log", base=2)
        draw_curves(axes, drawn, along)
        axes.set_title(at, fontsize="medium")
        if best is not None and best.ceiling_gbs is not None:
            shared = ", all ranks on one GPU" if best.num_gpus == 1 < best.num_ranks else ""
            axes.axhline(best.ceiling_gbs, color="black", linestyle="--", label=f"ceiling: {best.ceiling_of}{shared}")
    first = figure.axes[0]
    first.set_ylim(bottom=0)  # of both, when all is drawn
    first.set_ylabel("GB/s on the busiest link, per GPU")
    figure.legend(*first.get_legend_handles_labels(), loc="outside right upper", fontsize="small")


def draw_nodes(records: Sequence[Record], figure: Any) -> None:
    """Three plots: the network's rate over SMs without a node limit, its bytes and total times over the node limit."""
    free = [record for record in records if record.topk_groups is None]
    plots: list[tuple[str, str, dict[str, Curve]]] = [
        ("SMs", "GB/s between nodes, per GPU",
         curves(free, lambda r: r.num_sms, lambda r: (r.num_nodes, r.num_tokens), lambda r: r.network_gbs)[1]),
    ]  # fmt: skip
    values: tuple[tuple[str, Callable[[Record], float]], ...] = (
        ("MB between nodes, of the busiest GPU", lambda r: r.wire_bytes.network / 1e6),
        ("us, slowest rank, median", lambda r: r.total_us),
    )
    for what, value in values:
        _, over = curves(records, lambda r: r.topk_groups, lambda r: (r.num_nodes, r.num_tokens, r.num_sms), value)
        plots.append(("nodes that a token may go to", what, over))
    for axes, (along, what, drawn) in zip(figure.subplots(1, len(plots)), plots, strict=True):
        draw_curves(axes, drawn, along)
        axes.set_ylabel(what)
    best = max(records, key=lambda record: record.network_ceiling_gbs or 0)
    first = figure.axes[0]
    if best.network_ceiling_gbs is not None:
        label = f"ceiling: {best.network_ceiling_of}"
        first.axhline(best.network_ceiling_gbs, color="black", linestyle="--", label=label)
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
    figure.legend(*first.get_legend_handles_labels(), loc="outside right upper", fontsize="small")


COLOURS = {"rank": "C0", "expert": "C1", "padded": "C2"}
MARKERS = {"bf16": "o", "fp8": "s", "fp8_cast": "^"}


def draw_curves(axes: Any, drawn: dict[str, Curve], along: str) -> None:
    """A colour for each layout, a marker for each payload, combine dotted; with a tick for each point."""
    for name, curve in drawn.items():
        op, payload, layout = name.split()
        at, values = zip(*curve, strict=True)
        dashes = ":" if op == "combine" else "-"
        axes.plot(at, values, dashes, marker=MARKERS[payload], color=COLOURS[layout], label=name)
    ticks = sorted({at for curve in drawn.values() for at, _ in curve})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(along)
    axes.grid(alpha=0.3)


def draw_times(records: Sequence[Record], figure: Any) -> None:
    """One pair of bars per record, total time and baseline."""
    axes = figure.subplots()
    records = records[::-1]  # a horizontal bar chart starts at the bottom
    places = range(len(records))
    axes.barh([place + 0.2 for place in places], [record.total_us / 1e3 for record in records], 0.4, label="deep_a2a")
    with_baseline = [(place, record) for place, record in enumerate(records) if record.baseline_us is not None]
    axes.barh(
        [place - 0.2 for place, _ in with_baseline],
        [(record.baseline_us or 0) / 1e3 for _, record in with_baseline],
        0.4,
        label=next((record.baseline for _, record in with_baseline), None),
    )
    for place, record in with_baseline:
        axes.annotate(f" {record.speedup:.1f} x", (record.total_us / 1e3, place + 0.2), va="center", fontsize="small")
    axes.set_yticks(list(places), [label(record) for record in records], fontsize="small")
    axes.set_xlabel("ms, slowest rank, median")
    axes.margins(y=0.01)
    axes.legend()


def draw(results: ResultFile, path: Path) -> None:
    """Writes the plot of all records to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [record for record in results.records if record.op != "overlap"]
    on_gpus = any(record.backend != "cpu" for record in records)
    size = (12, 5.5) if on_gpus else (9, 1.5 + 0.3 * len(records))
    figure = pyplot.figure(figsize=size, layout="constrained")
    across = [record for record in records if record.num_nodes > 1]
    if on_gpus and across:
        draw_nodes(across, figure)
    else:
        (draw_bandwidth if on_gpus else draw_times)(records, figure)
    machine = results.machine
    where = f"{machine['gpus']} x {machine['gpu']}" if "gpu" in machine else f"{machine.get('cpu')}"
    figure.suptitle(f"{where}, {machine.get('cores')} cores, {results.date}", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws a result file of deep-a2a bench.")
    parser.add_argument("results", type=Path, help="a file that --json wrote")
    parser.add_argument("png", type=Path, nargs="?", help="where to draw (default: beside the results)")
    options = parser.parse_args()
    path = options.png or options.results.with_suffix(".png")
    draw(ResultFile.read(options.results), path)
    print(path)


if __name__ == "__main__":
    main()
