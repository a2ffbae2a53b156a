"""Lists of cells by name, for one command that takes a whole result file."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.record import Backend, Dtype, Layout
from deep_a2a.routing import KINDS

_LAYOUTS: tuple[Layout, ...] = ("rank", "expert", "padded")
_TWO_LAYOUTS: tuple[Layout, ...] = ("rank", "expert")
_SMALL_LAYOUTS: tuple[Layout, ...] = ("rank", "padded")
_DTYPES: tuple[Dtype, ...] = ("bf16", "fp8", "fp8_cast")
_TWO_DTYPES: tuple[Dtype, ...] = ("bf16", "fp8")
_SMS = (4, 8, 12, 16, 24)
_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
_MANY_TOKENS, _FEW_TOKENS = 4096, 128
_MIDDLE_SMS, _OVERLAP_SMS = 12, 8
_MOST_EXPERTS, _MOST_NODES = 256, 8


def base_cell(backend: Backend, num_ranks: int, ranks_per_node: int | None = None) -> Cell:
    """4096 tokens of 7168 in BF16, top-8 of 256 experts (or the most that the ranks divide), without a baseline.

    On the caller's stream: all there is to see between two events of a stream is the operation.
    """
    return Cell(
        backend=backend,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node or num_ranks,
        num_tokens=_MANY_TOKENS,
        num_experts=_MOST_EXPERTS - _MOST_EXPERTS % num_ranks,
        num_sms=_MIDDLE_SMS,
        stream="current",
        baseline=False,
    )


def targets(base: Cell) -> list[Cell]:
    """What there are targets for, the most wanted first; in a minute or less."""
    bf16, fp8 = base, replace(base, dtype="fp8")
    expert = replace(fp8, layout="expert")
    few = replace(fp8, num_tokens=_FEW_TOKENS, graph=True)
    return [
        replace(fp8, num_sms=8),
        replace(bf16, num_sms=8),
        replace(fp8, num_sms=12),
        replace(bf16, num_sms=12),
        replace(expert, num_sms=16),
        replace(expert, num_sms=24),
        replace(expert, num_sms=12),
        replace(few, num_sms=8),
        replace(base, dtype="fp8_cast", num_sms=12),
        replace(fp8, num_sms=12, routing="zipf"),
        replace(bf16, num_sms=8, routing="zipf"),
        replace(fp8, num_sms=4),
        replace(bf16, num_sms=4),
        replace(few, num_sms=8, layout="padded"),
        replace(few, num_sms=16, layout="padded"),
        replace(fp8, num_sms=12, output="owned", input="copied"),
        replace(fp8, num_sms=12, cached=True),
        # Last, so that no trouble of the baseline's costs a figure.
        replace(fp8, num_sms=8, baseline=True),
        replace(bf16, num_sms=8, baseline=True),
    ]


def sweep(base: Cell) -> list[Cell]:
    """Every dtype and layout over SMs, then one thing at a time: tokens, routings, cached or not, modes, graphs."""
    cells = [
        replace(base, dtype=dtype, layout=layout, num_sms=num_sms)
        for layout, dtype, num_sms in itertools.product(_LAYOUTS, _DTYPES, _SMS)
    ]
    fp8 = replace(base, dtype="fp8")
    cells += [
        replace(base, dtype=dtype, layout=layout, num_tokens=num_tokens, baseline=True)
        for layout, dtype, num_tokens in itertools.product(_TWO_LAYOUTS, _TWO_DTYPES, _TOKENS)
    ]
    cells += [replace(fp8, layout=layout, routing=kind) for layout in _TWO_LAYOUTS for kind in KINDS[1:]]
    cells += [
        replace(fp8, layout=layout, routing="zipf", num_sms=num_sms)
        for layout, num_sms in itertools.product(_TWO_LAYOUTS, _SMS)
    ]
    for layout, dtype in itertools.product(_TWO_LAYOUTS, _TWO_DTYPES):
        of = replace(base, layout=layout, dtype=dtype)
        cells += [replace(of, cached=True, num_sms=num_sms) for num_sms in _SMS]
        cells += [
            replace(of, output="owned"),
            replace(of, input="copied"),
            replace(of, host_sync=True),
            replace(of, stream="own"),
        ]
    cells += [
        replace(fp8, layout=layout, num_tokens=num_tokens, num_sms=num_sms, graph=True, cached=cached)
        for layout, num_tokens, num_sms, cached in itertools.product(_SMALL_LAYOUTS, (128, 256), (8, 16), (False, True))
    ]
    return list(dict.fromkeys(cells))


def overlap(base: Cell) -> list[Cell]:
    """Both payloads on few SMs, beside products that know nothing of it and products told to leave as many."""
    cell = replace(base, subject="overlap", stream="own", num_sms=_OVERLAP_SMS)
    return [
        replace(cell, dtype=dtype, gemm_leaves=leaves)
        for leaves, dtype in itertools.product((0, _OVERLAP_SMS), _TWO_DTYPES)
    ]


def nodes(base: Cell) -> list[Cell]:
    """Across nodes: both payloads and two layouts over SMs, then over the node limit, then other modes.

    Where there is one node, its halves pretend to be two; each rank to be one, where there are no halves.
    """
    if base.num_nodes == 1:
        if base.num_ranks == 1:
            raise ValueError("num_ranks is 1; expected 2 or more, for two nodes")
        base = replace(base, ranks_per_node=1 if base.num_ranks % 2 else base.num_ranks // 2)
    fp8 = replace(base, dtype="fp8")
    cells = [replace(of, num_sms=num_sms) for num_sms, of in itertools.product((8, 12), (fp8, base))]
    cells += [
        replace(base, dtype=dtype, layout=layout, num_sms=num_sms)
        for layout, dtype, num_sms in itertools.product(_TWO_LAYOUTS, _TWO_DTYPES, _SMS)
    ]
    limits = range(1, min(base.num_nodes, base.num_topk, _MOST_NODES) + 1)
    cells += [replace(of, topk_groups=limit) for of, limit in itertools.product((fp8, base), limits)]
    few = replace(fp8, num_tokens=_FEW_TOKENS, num_sms=8)
    cells += [
        replace(base, dtype="fp8_cast"),
        replace(fp8, cached=True),
        replace(fp8, host_sync=True),
        replace(fp8, routing="zipf"),
        few,
        replace(few, graph=True),
        replace(few, graph=True, layout="padded"),
        # Last, so that no trouble of the baseline's costs a figure.
        replace(fp8, baseline=True),
        replace(base, baseline=True),
    ]
    return list(dict.fromkeys(cells))


SUITES: dict[str, Callable[[Cell], list[Cell]]] = {
    "targets": targets, "sweep": sweep, "overlap": overlap, "nodes": nodes,
}  # fmt: skip


def suite(name: str, backend: Backend, num_ranks: int, ranks_per_node: int | None = None) -> list[Cell]:
    """The cells of a suite. For the emulator they are cut down to sizes that it can run. Raises ValueError."""
    cells = SUITES[name](base_cell("cuda", num_ranks, ranks_per_node))
    if backend == "cuda":
        return cells
    return list(dict.fromkeys(shrunk(replace(cell, graph=False, backend=backend)) for cell in cells))


def shrunk(cell: Cell) -> Cell:
    """The same in small, where times mean nothing."""
    return replace(
        cell,
        num_tokens=min(cell.num_tokens // 128, 16),
        hidden=256,
        num_topk=2,
        num_experts=4 * cell.num_ranks,
        num_sms=min(cell.num_sms or 1, 2),
        gemm_rows=8,
        gemm_channels=16,
        num_iters=2,
        num_warmup=1,
    )
