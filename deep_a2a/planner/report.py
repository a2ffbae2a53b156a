"""Plans and comparisons as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .plan import OperationPlan, Plan
from .published import Comparison
from .rates import RATES
from .reasons import reason
from .tables import Table, binary_bytes, decimal_bytes, microseconds
from .windows import part_bytes


def format_plan(plan: Plan) -> str:
    """Everything about one workload."""
    return "\n".join(
        [
            title(plan),
            "",
            operations_table(plan).text(),
            "",
            *_window_lines(plan),
            "",
            "A lower bound: see docs/planner.md for what is left out. Rates and where they come from:",
            rates_table(_used(plan)).text(),
        ]
    )


def title(plan: Plan) -> str:
    w, spread = plan.workload, plan.spread
    limited = f", at most {w.kept_groups} of {w.groups} groups" if w.topk_groups is not None else ""
    busiest = f"; the busiest rank gets {spread.busiest_rank:.2f} x the mean" if spread.busiest_rank > 1.005 else ""
    return (
        f"{_count(w.num_ranks, 'rank')} in {_count(w.num_nodes, 'node')}, {w.num_tokens} tokens of {w.hidden} a rank\n"
        f"top-{w.num_topk} of {w.num_experts} experts, {w.routing} routing{limited}, layout {w.layout}, "
        f"{plan.num_sms or 'enough'} SMs\n"
        f"a token goes to {spread.ranks_per_token:.2f} ranks and {spread.nodes_per_token:.2f} nodes "
        f"({spread.method}){busiest}"
    )


def operations_table(plan: Plan) -> Table:
    """Bytes and times of dispatch and combine, side by side."""
    both = (plan.dispatch, plan.combine)
    rows = [
        ("wire bytes, NVLink", *(decimal_bytes(each.traffic.nvlink_wire_bytes) for each in both)),
        ("wire bytes, network", *(decimal_bytes(each.traffic.network_wire_bytes) for each in both)),
        ("logical bytes", *(decimal_bytes(each.traffic.logical_bytes) for each in both)),
        ("with headers, NVLink", *(decimal_bytes(_most(each, "nvlink")) for each in both)),
        ("with headers, network", *(decimal_bytes(_most(each, "network")) for each in both)),
    ]
    for name in plan.dispatch.estimate.terms:
        rows.append((f"us, {name}", *(microseconds(each.estimate.terms[name]) for each in both)))
    rows += [
        ("us, fixed", *(microseconds(each.estimate.fixed_us) for each in both)),
        ("us, total", *(microseconds(each.estimate.total_us) for each in both)),
        ("limit", *(each.estimate.limit for each in both)),
        ("logical GB/s, received", *(f"{each.logical_gbs:.0f}" for each in both)),
        ("logical GB/s, nodes", *(f"{each.node_gbs:.1f}" if plan.workload.num_nodes > 1 else "-" for each in both)),
        ("SMs needed", *(str(each.estimate.sms_needed) for each in both)),
    ]
    return Table(("busiest GPU", f"dispatch {plan.workload.dtype.upper()}", "combine BF16"), tuple(rows))


def scale_table(plans: Iterable[Plan]) -> Table:
    """A line for each plan."""
    rows = tuple(
        (
            str(plan.workload.num_ranks),
            str(plan.workload.num_nodes),
            str(plan.workload.num_experts),
            f"{plan.spread.ranks_per_token:.2f}",
            f"{plan.spread.nodes_per_token:.2f}",
            decimal_bytes(_most(plan.dispatch, "nvlink")),
            decimal_bytes(_most(plan.dispatch, "network")),
            microseconds(plan.dispatch.estimate.total_us),
            plan.dispatch.estimate.limit,
            microseconds(plan.combine.estimate.total_us),
            plan.combine.estimate.limit,
            _sms(plan),
            binary_bytes(plan.window.worst.total_bytes),
            "-" if plan.window.bounded is None else binary_bytes(plan.window.bounded.total_bytes),
        )
        for plan in plans
    )
    header = (
        "ranks", "nodes", "experts", "ranks/token", "nodes/token", "NVLink", "network", "dispatch us", "limit",
        "combine us", "limit", "SMs", "window", "bounded",
    )  # fmt: skip
    return Table(header, rows, left=0)


def window_table(plans: Iterable[Plan]) -> Table:
    """Windows and their parts: the default capacity, and one bounded to the expected rows."""
    header = ("ranks", "nodes", "default", "bounded", "max_recv_rows", "received", "combine", "between nodes", "counts")
    rows = []
    for plan in plans:
        window = plan.window
        parts = part_bytes(window.worst if window.bounded is None else window.bounded)
        total = "-" if window.bounded is None else binary_bytes(window.bounded.total_bytes)
        shown = (binary_bytes(parts[name]) for name in header[5:])
        capacity = "-" if window.max_recv_rows is None else str(window.max_recv_rows)
        w = plan.workload
        rows.append(
            (str(w.num_ranks), str(w.num_nodes), binary_bytes(window.worst.total_bytes), total, capacity, *shown)
        )
    return Table(header, tuple(rows), left=0)


def staging_table(plans: Iterable[Plan]) -> Table:
    """Room between nodes, without a limit and with it, and the rounds that follow."""
    header = ("ranks", "nodes", "all at once", "limited", "rounds", "tokens/round", "rows/stream", "waits us")
    rows = []
    for plan in plans:
        w, staging = plan.workload, plan.staging
        stream_rows = staging.tokens_per_round * plan.spread.nodes_per_token / w.num_nodes
        waits = plan.dispatch.estimate.terms.get("rounds", 0.0)
        rows.append(
            (str(w.num_ranks), str(w.num_nodes), binary_bytes(staging.unlimited_bytes), binary_bytes(staging.num_bytes),
             str(staging.num_rounds), str(staging.tokens_per_round), f"{stream_rows:.1f}", microseconds(waits))
        )  # fmt: skip
    return Table(header, tuple(rows), left=0)


def spread_table(plans: Iterable[Plan]) -> Table:
    rows = tuple(
        (
            plan.workload.routing,
            str(plan.workload.num_ranks),
            str(plan.workload.topk_groups or "any"),
            f"{plan.spread.ranks_per_token:.2f}",
            f"{plan.spread.nodes_per_token:.2f}",
            f"{plan.spread.busiest_rank:.2f}",
            plan.spread.method,
        )
        for plan in plans
    )
    header = ("routing", "ranks", "groups kept", "ranks/token", "nodes/token", "busiest rank", "how")
    return Table(header, rows, notes=True)


def published_table(comparisons: Iterable[Comparison], among: Sequence[Comparison]) -> Table:
    """Published figures beside the model; `among` is what reasons are looked for in."""
    rows = []
    for each in comparisons:
        figure = each.figure
        in_us = figure.total_us is not None
        published = f"{figure.total_us:g} us" if in_us else f"{figure.logical_gbs:g} GB/s"
        model = f"{each.model.estimate.total_us:.1f} us" if in_us else f"{each.model_gbs:.1f} GB/s"
        operation = f"{figure.op} {figure.dtype.upper()}, {figure.num_tokens} tokens"
        rows.append(
            (figure.package, operation, f"{figure.num_nodes}x{figure.ranks_per_node} {figure.gpu}",
             str(figure.num_sms or "-"), published, model, each.model.estimate.limit, f"{each.deviation:+.1%}",
             reason(each, among))
        )  # fmt: skip
    header = ("package", "operation", "GPUs", "SMs", "published", "model", "limit", "deviation", "why")
    return Table(header, tuple(rows), left=3, notes=True)


def line_rate_table(at_puts: Sequence[Comparison], at_line: Sequence[Comparison]) -> Table:
    """How much the deviation depends on the network's rate: the same figures in both."""
    rows = tuple(
        (puts.figure.package, f"{puts.figure.op} {puts.figure.dtype.upper()}", str(puts.figure.num_nodes),
         f"{puts.deviation:+.1%}", f"{line.deviation:+.1%}")
        for puts, line in zip(at_puts, at_line, strict=True)
    )  # fmt: skip
    rates = (f"deviation at {RATES[name].value:g} GB/s" for name in ("network_put", "network_line"))
    return Table(("package", "operation", "nodes", *rates), rows, left=2)


def rates_table(names: Iterable[str]) -> Table:
    rows = tuple((rate.name, f"{rate.value:g} {rate.unit}", rate.source) for rate in map(RATES.__getitem__, names))
    return Table(("rate", "value", "source"), rows, notes=True)


def _used(plan: Plan) -> list[str]:
    """Rates that this plan has unchanged from the defaults."""
    given = plan.hardware
    pairs = (
        ("sm_out", given.sm_out_gbs), ("sm_in", given.sm_in_gbs), ("nvlink_push", given.nvlink_push_gbs),
        ("nvlink_pull", given.nvlink_pull_gbs), ("flag", given.flag_us), ("network_put", given.network_gbs),
        ("network_signal", given.network_signal_us), ("h200_memory", given.memory_gbs),
    )  # fmt: skip
    return [name for name, value in pairs if RATES[name].value == value]


def _window_lines(plan: Plan) -> list[str]:
    window = plan.window
    lines = [f"one rank's window: {binary_bytes(window.worst.total_bytes)} with room for any routing"]
    shown = window.worst
    if window.bounded is not None:
        shown = window.bounded
        total = binary_bytes(shown.total_bytes)
        lines.append(f"                   {total} with max_recv_rows={window.max_recv_rows}, of which")
    parts = ", ".join(f"{name} {binary_bytes(size)}" for name, size in part_bytes(shown).items())
    lines.append(f"                   {parts}")
    if plan.staging.num_rounds > 1:
        at_once = binary_bytes(plan.staging.unlimited_bytes)
        rounds = f"{plan.staging.num_rounds} rounds of {plan.staging.tokens_per_round} tokens"
        lines.append(f"                   between nodes in {rounds}; all at once would take {at_once}")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _most(operation: OperationPlan, link: str) -> float:
    outwards: float = getattr(operation.traffic, f"{link}_out")
    inwards: float = getattr(operation.traffic, f"{link}_in")
    return max(outwards, inwards)


def _sms(plan: Plan) -> str:
    return str(max(plan.dispatch.estimate.sms_needed, plan.combine.estimate.sms_needed))
