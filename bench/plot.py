"""Draws a result file: one pair of bars per record, total time and baseline.

    python bench/plot.py bench/results/cpu.json [PNG]

Needs matplotlib: pip install 'deep-a2a[bench]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deep_a2a.benchmark.record import Record, ResultFile


def label(record: Record) -> str:
    """What tells a record from the others of its file."""
    parts = [
        record.op,
        record.dtype,
        record.layout,
        f"{record.num_ranks // record.ranks_per_node}x{record.ranks_per_node}",
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


def draw(results: ResultFile, path: Path) -> None:
    """Writes the plot of all records to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = list(results.records)[::-1]  # a horizontal bar chart starts at the bottom
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.3 * len(records)), layout="constrained")
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
    axes.set_title(
        f"{results.machine.get('cpu')}, {results.machine.get('cores')} cores, {results.date}", fontsize="small"
    )
    axes.legend()
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
