"""A run of cells on all ranks: progress as it goes, the result file after every cell, failures at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch.distributed as dist

from deep_a2a.benchmark.agreement import MeasurementError
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.gpus import describe_gpus
from deep_a2a.benchmark.machine import describe_machine
from deep_a2a.benchmark.measure import CellRun
from deep_a2a.benchmark.network import prepare_network
from deep_a2a.benchmark.overlap import OverlapRun
from deep_a2a.benchmark.record import Record, ResultFile
from deep_a2a.benchmark.session import Session
from deep_a2a.nvshmem_environment import nics


@dataclass(frozen=True)
class Job:
    """Cells of one backend and one number of ranks. `command` is what the result file says they came from.

    Raises ValueError if the cells do not go together.
    """

    cells: Sequence[Cell]
    command: str
    json_path: Path | None = None

    def __post_init__(self) -> None:
        for name in ("backend", "num_ranks"):
            values = sorted({getattr(cell, name) for cell in self.cells})
            if len(values) != 1:
                raise ValueError(f"{name} is {values} in the cells of a run; expected one value")


@dataclass(frozen=True)
class Outcome:
    """What a run brought: the result file, and what was wrong with the cells that have no records."""

    results: ResultFile
    failures: Sequence[str]


def run_job(group: dist.ProcessGroup, job: Job) -> Outcome:
    """Measures all cells; collective over `group`. A cell that fails on all ranks does not keep the next from running.

    Two records a cell, dispatch and combine; one for subject "overlap". Every rank returns the same.
    """
    journal = Journal(job, writes=dist.get_rank(group) == 0)
    journal.say(f"{len(job.cells)} cells on {dist.get_world_size(group)} ranks, backend {job.cells[0].backend}")
    session = Session(group, job.cells[0].backend)
    with session.place.current():
        prepare_network(job.cells)
        session.open({cell.ranks_per_node for cell in job.cells}, {cell.num_sms for cell in job.cells if cell.num_sms})
        journal.open(session)
        for number, cell in enumerate(job.cells, start=1):
            journal.say(f"[{number}/{len(job.cells)}] {cell.describe()}")
            run = OverlapRun if cell.subject == "overlap" else CellRun
            try:
                journal.add(run(session, cell).run())
            except MeasurementError as error:
                journal.fail(cell, error)
                fabric = session.fabric(cell)
                if fabric is not None:
                    fabric.renew_gate()
        journal.say("done")
        session.close()
    return Outcome(journal.results, journal.failures)


class Journal:
    """What a rank knows of the run so far; one rank prints and writes it."""

    def __init__(self, job: Job, *, writes: bool) -> None:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.results = ResultFile({}, job.command, date)
        self.failures: list[str] = []
        self._path, self._writes = job.json_path, writes
        self._start_s = time.monotonic()

    def open(self, session: Session) -> None:
        machine = {**describe_machine(), **describe_gpus(session.place.device)}
        if session.hosts.count > 1:
            machine |= {"hosts": session.hosts.count, "nics": nics()}
        for fabric in session.fabrics.values():
            for name, speeds in fabric.to_json().items():
                machine.setdefault(name, []).extend(speeds)
            if fabric.network is not None:
                machine["network_carrier"] = fabric.network.carrier
            for line in fabric.describe():
                self.say(line)
        self.results = replace(self.results, machine=machine)

    def say(self, text: str) -> None:
        if self._writes:
            print(f"[{time.monotonic() - self._start_s:7.1f} s] {text}", file=sys.stderr, flush=True)

    def add(self, records: Sequence[Record]) -> None:
        self.results = replace(self.results, records=(*self.results.records, *records))
        for record in records:
            ratio = "" if record.link_time_ratio is None else f", link-time ratio {record.link_time_ratio:.3f}"
            self.say(f"    {record.op}: {record.total_us:.1f} us{ratio}")
        if self._writes and self._path is not None:
            self.results.write(self._path)

    def fail(self, cell: Cell, error: MeasurementError) -> None:
        self.failures.append(f"{cell.describe()}: {error}")
        self.say(f"    FAILED: {error}")
