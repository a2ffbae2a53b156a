"""Draws the planner's curves beside measured and published points: docs/planner.png.

    python bench/plot_plan.py [PNG]

Needs matplotlib: pip install 'deep-a2a[bench]'.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deep_a2a.benchmark.record import ResultFile
from deep_a2a.planner.measured import MeasuredTime, measured_kernels, measured_operations
from deep_a2a.planner.plan import OperationPlan, make_plan
from deep_a2a.planner.published import Comparison, compare, read_figures
from deep_a2a.planner.rates import H100, RATES
from deep_a2a.planner.traffic import Op
from deep_a2a.planner.windows import part_bytes
from deep_a2a.planner.workload import Dtype, Workload

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "bench" / "results" / "published.json"
RESULTS = ROOT / "bench" / "results" / "h200x4.json"
SMS = range(2, 25)
NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
SCALES = (64, 128, 256, 512, 1024, 2048)
KINDS: tuple[tuple[str, Op, Dtype], ...] = (
    ("dispatch BF16", "dispatch", "bf16"),
    ("dispatch FP8", "dispatch", "fp8"),
    ("combine BF16", "combine", "bf16"),
)


def operation(workload: Workload, op: Op, num_sms: int | None = None) -> OperationPlan:
    plan = make_plan(workload, num_sms=num_sms)
    return plan.dispatch if op == "dispatch" else plan.combine


def draw_sms(axes: Any, kernels: Sequence[MeasuredTime], operations: Sequence[MeasuredTime]) -> None:
    """Four GPUs of one host, over SMs: kernels alone are hollow, whole operations full."""
    for index, (name, op, dtype) in enumerate(KINDS):
        workload = Workload(num_ranks=4, ranks_per_node=4, dtype=dtype)
        axes.plot(SMS, [operation(workload, op, sms).estimate.total_us for sms in SMS], color=f"C{index}", label=name)
        for times, fill in ((kernels, "none"), (operations, f"C{index}")):
            points = [
                (each.num_sms, (each.low_us + each.high_us) / 2)
                for each in times
                if each.name.startswith(name) and "expert" not in each.name and "padded" not in each.name
                and "128 tokens" not in each.name and "zipf" not in each.name and "cast" not in each.name
            ]  # fmt: skip
            axes.scatter(*zip(*points, strict=True), edgecolors=f"C{index}", facecolors=fill, zorder=3)
    axes.set_title("4 x H200: model, kernels (hollow), operations (full)", fontsize="small")
    axes.set_xlabel("SMs")
    axes.set_ylabel("us, 4096 tokens")
    axes.set_ylim(0, 1400)


def draw_nodes(axes: Any, comparisons: Sequence[Comparison]) -> None:
    """Logical GB/s of the network over nodes: the model, and the best that each package has published there."""
    for index, (name, op, dtype) in enumerate(KINDS):
        if dtype == "bf16" and op == "dispatch":
            continue
        plans = [make_plan(Workload(num_ranks=8 * n, num_experts=8 * n * 8, dtype=dtype), H100) for n in NODES]
        gbs = [(plan.dispatch if op == "dispatch" else plan.combine).node_gbs for plan in plans]
        axes.plot(NODES, gbs, color=f"C{index}", label=f"{name}, model")
        for package, marker in (("DeepEP V2", "*"), ("Hybrid-EP", "o"), ("DeepEP V1", "^")):
            label = f"{package} (H800)" if package == "DeepEP V1" else package
            best: dict[int, float] = {}
            for figure in (each.figure for each in comparisons):
                fits = figure.package == package and figure.op == op and (op == "combine" or figure.dtype == dtype)
                if fits and figure.logical_gbs is not None and figure.num_nodes > 1:
                    best[figure.num_nodes] = max(best.get(figure.num_nodes, 0.0), figure.logical_gbs)
            axes.scatter(
                list(best), list(best.values()), color=f"C{index}", marker=marker, label=f"{label}, {op}", zorder=3
            )
    line = RATES["network_line"].value
    axes.plot(NODES, [line * n / (n - 1) for n in NODES], "k:", label="line rate")
    axes.set_title("8 GPUs a node, a 400 Gb/s NIC each", fontsize="small")
    axes.set_xscale("log", base=2)
    axes.set_xticks((2, 4, 8, 16, 32), ("2", "4", "8", "16", "32"))
    axes.set_xlabel("nodes")
    axes.set_ylabel("logical GB/s, own node included")
    axes.set_ylim(0, 110)


def draw_scales(axes: Any) -> None:
    """64 to 2048 ranks."""
    for index, (name, op, dtype) in enumerate(KINDS):
        if dtype == "bf16" and op == "dispatch":
            continue
        for groups, line in ((4, "-"), (None, "--")):
            workloads = [
                Workload(num_ranks=ranks, num_experts=max(256, ranks), dtype=dtype, topk_groups=groups)
                for ranks in SCALES
            ]
            times = [operation(each, op).estimate.total_us / 1e3 for each in workloads]
            axes.plot(SCALES, times, line, color=f"C{index}", label=f"{name}, {groups or 'any'} nodes a token")
    axes.set_title("DeepSeek-V3's shape, 4096 tokens a rank", fontsize="small")
    _ranks(axes)
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)


def draw_windows(axes: Any) -> None:
    """What one rank's window takes."""
    plans = [make_plan(Workload(num_ranks=ranks, num_experts=max(256, ranks), topk_groups=4)) for ranks in SCALES]
    bounded = [plan.window.bounded or plan.window.worst for plan in plans]
    for name, sizes in (
        ("room for any routing", [plan.window.worst.total_bytes for plan in plans]),
        ("bounded to 1.25 x the rows expected", [table.total_bytes for table in bounded]),
        ("of it: between nodes", [part_bytes(table)["between nodes"] for table in bounded]),
    ):
        axes.plot(SCALES, [size / 2**30 for size in sizes], label=name)
    axes.axhline(80, color="black", linestyle=":", label="80 GiB")
    axes.set_title("window of a rank, 2 slots, 2 lanes", fontsize="small")
    _ranks(axes)
    axes.set_yscale("log")
    axes.set_ylabel("GiB")


def _ranks(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(SCALES, [str(ranks) for ranks in SCALES])
    axes.set_xlabel("ranks")


def draw(path: Path) -> None:
    """Writes the plot to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 8), layout="constrained")
    sides = figure.subplots(2, 2)
    draw_sms(sides[0][0], measured_kernels(FIGURES), measured_operations(ResultFile.read(RESULTS).records))
    draw_nodes(sides[0][1], compare(read_figures(FIGURES)))
    draw_scales(sides[1][0])
    draw_windows(sides[1][1])
    for axes in sides.flat:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the planner's curves beside measured and published points.")
    default = ROOT / "docs" / "planner.png"
    parser.add_argument("png", type=Path, nargs="?", default=default, help="where to draw (default: docs/planner.png)")
    options = parser.parse_args()
    draw(options.png)
    print(options.png)


if __name__ == "__main__":
    main()
