"""Times the kernels of dispatch and combine as one rank of several sees them, on fewer GPUs than ranks.

    python bench/kernels.py --devices 0,1,1,1 --layout rank expert --num-tokens 4096 128 --num-sms 4 8 12 --json FILE

One process drives all ranks. With the devices 0,1,1,1 rank 0 has a GPU of its own, and its link carries out and in what
it would among four GPUs; the other three divide the SMs of the second GPU. So only rank 0's times are worth quoting.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from kernel_calls import Kernels
from kernel_ranks import Ranks, prepare_environment

from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.gpus import describe_gpus
from deep_a2a.benchmark.link import Link, ceiling_fields
from deep_a2a.benchmark.machine import describe_machine
from deep_a2a.benchmark.record import Dtype, Layout, Record, ResultFile, WireBytes
from deep_a2a.benchmark.table import LEGEND, format_table

_OPS = ("dispatch", "combine")
_LEAST_ITERS = 8
_NOTE = "Here it is all of rank 0, not of the slowest or the busiest rank."


@dataclass(frozen=True)
class Rows:
    """Rows of one dispatch as rank 0 sees them: to and from other ranks, and to itself."""

    sent: int
    received: int
    own: int

    @staticmethod
    def of(cell: Cell, topk_idx: Sequence[torch.Tensor]) -> Rows:
        """A row crosses once for each token and destination rank, whatever the layout."""
        ranks = torch.arange(cell.num_ranks)
        goes = [(idx.div(cell.num_local_experts, rounding_mode="floor").unsqueeze(-1) == ranks) for idx in topk_idx]
        counts = torch.stack([each.any(dim=1).sum(dim=0) for each in goes])  # [source, destination]
        own = int(counts[0, 0])
        return Rows(int(counts[0].sum()) - own, int(counts[:, 0].sum()) - own, own)


def make_parser() -> argparse.ArgumentParser:
    cell = Cell()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--devices", type=_devices, default=(0, 1, 1, 1), metavar="N,N", help="the GPU of each rank (default: 0,1,1,1)"
    )
    parser.add_argument("--op", nargs="+", choices=_OPS, default=_OPS, help="(default: both)")
    parser.add_argument("--layout", nargs="+", choices=get_args(Layout), default=["rank"], help="(default: rank)")
    parser.add_argument("--dtype", nargs="+", choices=get_args(Dtype), default=get_args(Dtype), help="(default: all)")
    parser.add_argument("--cached", nargs="+", choices=("no", "yes"), default=("no", "yes"), help="(default: both)")
    for name, default in (("num-tokens", 4096), ("num-sms", 8)):
        parser.add_argument(
            f"--{name}", type=int, nargs="+", default=[default], metavar="N", help=f"of each rank (default: {default})"
        )
    for name in ("hidden", "num-topk", "num-experts"):
        default = getattr(cell, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--iters", type=int, default=_LEAST_ITERS, metavar="N", help="that count, of each cell (default: %(default)s)"
    )
    parser.add_argument(
        "--flush", action="store_true", help="before each iteration all caches are filled with something else"
    )
    parser.add_argument(
        "--backend", choices=("cuda", "emulated"), default="cuda",
        help="emulated: for tests at tiny sizes; its times mean nothing (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records, and the machine, to FILE")
    return parser


def _devices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(device) for device in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"devices is {text!r}; expected numbers with commas, as in 0,1,1,1") from None


def make_cells(options: argparse.Namespace) -> list[Cell]:
    """One for each layout and number of tokens. Raises ValueError, naming the option."""
    if options.iters < _LEAST_ITERS:
        raise ValueError(f"iters is {options.iters}; expected {_LEAST_ITERS} or more")
    if options.flush and options.backend != "cuda":
        raise ValueError(f"flush is given with backend {options.backend}, which has no caches; expected backend cuda")
    num_ranks = len(options.devices)
    cells = [
        Cell(
            backend=options.backend, num_ranks=num_ranks, ranks_per_node=num_ranks, layout=layout,
            num_tokens=num_tokens, hidden=options.hidden, num_topk=options.num_topk, num_experts=options.num_experts,
            stream="current", num_iters=options.iters, checked=False, baseline=False,
        )
        for layout, num_tokens in itertools.product(options.layout, options.num_tokens)
    ]  # fmt: skip
    for cell, dtype, num_sms in itertools.product(cells, options.dtype, options.num_sms):
        replace(cell, dtype=dtype, num_sms=num_sms)  # what is wrong with any of them is told before the first is run
    return cells


class Measurement:
    """The cells of one layout and number of tokens, after each other."""

    def __init__(self, ranks: Ranks, cell: Cell, options: argparse.Namespace) -> None:
        self._ranks, self._cell, self._options = ranks, cell, options
        self._kernels = Kernels(ranks, cell, {cell.dtype, *options.dtype})
        self._rows = Rows.of(cell, self._kernels.topk_idx)
        self.most_sms = self._kernels.most_sms
        if max(options.num_sms) > self.most_sms:
            raise ValueError(
                f"num_sms is {max(options.num_sms)}; expected at most {self.most_sms} with devices "
                f"{','.join(map(str, ranks.devices))}: the ranks of a device divide its SMs"
            )

    def run(self, link: Link) -> Iterator[Record]:
        for num_sms in self._options.num_sms:
            if "dispatch" in self._options.op:
                for cached, dtype in itertools.product(self._options.cached, self._options.dtype):
                    cell = replace(self._cell, dtype=dtype, num_sms=num_sms, cached=cached == "yes")
                    yield self._dispatch(cell, num_sms, link)
            if "combine" in self._options.op:
                yield self._combine(replace(self._cell, num_sms=num_sms), num_sms, link)

    def _dispatch(self, cell: Cell, num_sms: int, link: Link) -> Record:
        self._kernels.route(cell.dtype, num_sms)
        call = partial(self._kernels.dispatch, dtype=cell.dtype, num_sms=num_sms, cached=cell.cached)
        total_us = self._ranks.measure(call, cell.num_iters, after=self._kernels.release)
        return self._record(cell, "dispatch", total_us, self._rows.received, link)

    def _combine(self, cell: Cell, num_sms: int, link: Link) -> Record:
        self._kernels.route(cell.dtype, num_sms)
        total_us = self._ranks.measure(partial(self._kernels.combine, num_sms=num_sms), cell.num_iters)
        return self._record(cell, "combine", total_us, self._rows.sent, link)

    def _record(self, cell: Cell, op: str, total_us: float, arriving: int, link: Link) -> Record:
        self._kernels.check()
        wire = WireBytes(nvlink=max(self._rows.sent, self._rows.received) * cell.row_bytes)
        return cell.record(
            op=op,
            output="leased" if op == "dispatch" else "owned",
            num_gpus=len(set(self._ranks.devices)) if cell.backend == "cuda" else None,
            total_us=round(total_us, 1),
            wire_bytes=wire,
            logical_bytes=(arriving + self._rows.own) * cell.row_bytes,
            **ceiling_fields(total_us, wire, link.ceiling.gbs, link.describe()),
            devices=self._ranks.devices,
        )


def measure(options: argparse.Namespace, command: str) -> ResultFile:
    """Measures all cells; writes the result file after each. Raises ValueError for arguments that do not fit."""
    cells = make_cells(options)
    ranks = Ranks(options.backend, options.devices, flush=options.flush)
    machine = {**describe_machine(), **describe_gpus(ranks.places[0])}
    results = ResultFile(machine, command, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    link: Link | None = None
    for cell in cells:
        measurement = Measurement(ranks, cell, options)
        if link is None:
            link = ranks.measure_link(measurement.most_sms, options.iters)
            results = replace(results, machine={**machine, "link": link.to_json()})
        for record in measurement.run(link):
            results = replace(results, records=(*results.records, record))
            mode = "cached" if record.cached else "counted"
            print(
                f"{record.op} {record.dtype} {record.layout} {mode}, {record.num_tokens} tokens, {record.num_sms} SMs: "
                f"{record.total_us} us, link-time ratio {record.link_time_ratio}",
                file=sys.stderr,
                flush=True,
            )
            if options.json is not None:
                results.write(options.json)
        del measurement  # its windows, before there are new ones
    return results


def main(arguments: list[str]) -> int:
    prepare_environment()
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        results = measure(options, f"python bench/kernels.py {shlex.join(arguments)}".rstrip())
    except ValueError as error:
        parser.error(str(error))
    print(f"{format_table(results.records)}\n\n{LEGEND}\n{_NOTE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
