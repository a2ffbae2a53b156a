"""Why a published figure is far from the model: computed from published figures, and given only if it holds.

The model is a lower bound for this project's protocol. A time far above it is explained by what its own table, or
another package on the same links, shows; "open" is said where nothing does.
"""

from __future__ import annotations

from collections.abc import Sequence

from .published import WITHIN, Comparison
from .rates import RATES

OPEN = "open"


def reason(of: Comparison, among: Sequence[Comparison]) -> str:
    """`among`: all comparisons, those measured for this project with them. Empty for a figure that is close."""
    if of.close:
        return ""
    if of.deviation > 0:
        return f"faster than the model: the rate of {of.model.estimate.limit} is too low for it"
    for rule in (_more_sms, _fixed_time, _row_per_expert, _other_package, _measured_here):
        found = rule(of, among)
        if found is not None:
            return found
    return OPEN


def _more_sms(of: Comparison, among: Sequence[Comparison]) -> str | None:
    """The same with more SMs is faster by as much as counts here: then it was the SMs."""
    faster = [
        each
        for each in among
        if _same_table(of, each)
        and each.figure.dtype == of.figure.dtype
        and (each.figure.num_sms or 0) > (of.figure.num_sms or 0) > 0
        and of.published_us > each.published_us * (1 + WITHIN)
    ]
    if not faster:
        return None
    best = min(faster, key=lambda each: each.published_us)
    traffic, sms_us = of.model.traffic, (of.figure.num_sms or 1) * of.published_us * 1e3
    stores, loads = traffic.sm_out / sms_us, traffic.sm_in / sms_us
    return (
        f"few SMs: {of.published_us / best.published_us:.2f} x faster with {best.figure.num_sms}; each one stores "
        f"{stores:.0f} of {RATES['sm_out'].value:.0f} and loads {loads:.0f} of {RATES['sm_in'].value:.0f} GB/s"
    )


def _fixed_time(of: Comparison, among: Sequence[Comparison]) -> str | None:
    """Dispatch in FP8 and in BF16 lie on a line over bytes: what it says for no bytes is in no model of rates."""
    others = [
        each
        for each in among
        if _same_table(of, each) and each.figure.dtype != of.figure.dtype and each.figure.num_sms == of.figure.num_sms
    ]
    if of.figure.op != "dispatch" or of.figure.num_nodes == 1 or not others:
        return None
    small, large = sorted((of, others[0]), key=lambda each: each.model.traffic.network_wire_bytes)
    more_bytes = large.model.traffic.network_wire_bytes - small.model.traffic.network_wire_bytes
    more_us = large.published_us - small.published_us
    if more_us <= 0:
        return None
    gbs = more_bytes / more_us / 1e3
    fixed_us = small.published_us - small.model.traffic.network_wire_bytes / gbs / 1e3
    left = (of.model.estimate.total_us + fixed_us) / of.published_us - 1
    if not 0 < gbs <= RATES["network_line"].value or fixed_us <= 0 or abs(left) > WITHIN:
        return None
    return (
        f"its FP8 and BF16 lie on a line of {gbs:.0f} GB/s and {fixed_us:.0f} us for no bytes; with these {left:+.0%}"
    )


def _row_per_expert(of: Comparison, among: Sequence[Comparison]) -> str | None:
    """DeepEP's low-latency kernels (its csrc/kernels/internode_ll.cu) send a token once for each expert, not rank."""
    figure = of.figure
    if figure.layout != "padded" or "low latency" not in figure.package:
        return None
    remote = 1 - 1 / figure.num_ranks
    rows = figure.num_tokens * figure.num_topk * remote
    # What is not proportional to rows lies in `fixed_us`, ours.
    model = of.model.estimate
    link_us = (model.total_us - model.fixed_us) * rows / of.model.traffic.nvlink_rows
    here = _measured_here(of, among)
    return f"sends a row for each expert: {link_us:.0f} us on the link" + (f"; {here}" if here else "")


def _other_package(of: Comparison, among: Sequence[Comparison]) -> str | None:
    """Another package comes close to the same bound on the same links: then these are not what holds this one up."""
    if not of.model.estimate.limit.startswith("network"):
        return None
    for each in among:
        same = (each.figure.op, each.figure.num_nodes, each.figure.gpu) == (
            of.figure.op,
            of.figure.num_nodes,
            of.figure.gpu,
        )
        if same and each.close and _family(each) != _family(of) and each.model.estimate.limit.startswith("network"):
            return f"not the link: {each.figure.package} is within {abs(each.deviation):.0%} of its bound on it"
    return None


def _measured_here(of: Comparison, among: Sequence[Comparison]) -> str | None:
    """What the same package was measured at for this project, beside the same model."""
    own = [
        each
        for each in among
        if each.figure.gpu == "H200"
        and _family(each) == _family(of)
        and (each.figure.op, each.figure.dtype, each.figure.layout) == (of.figure.op, of.figure.dtype, of.figure.layout)
        and ("low latency" in each.figure.package) == ("low latency" in of.figure.package)
    ]
    if not own:
        return None
    times = own[0].published_us / own[0].model.estimate.total_us
    if times <= 1 + WITHIN:
        return None
    return f"{own[0].figure.package} took {times:.1f} x the model's time on 4 x H200 as well"


def _same_table(one: Comparison, other: Comparison) -> bool:
    """The same but for dtype and SMs."""
    a, b = one.figure, other.figure
    return one is not other and all(
        getattr(a, name) == getattr(b, name)
        for name in ("package", "gpu", "source", "op", "layout", "num_ranks", "ranks_per_node", "num_tokens")
    )


def _family(of: Comparison) -> str:
    """The package and its major version: "deepep v1"."""
    words = of.figure.package.lower().replace(",", "").split()
    return " ".join([words[0], words[1].split(".")[0]]) if len(words) > 1 and words[1][0] == "v" else words[0]
