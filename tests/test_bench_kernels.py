"""bench/kernels.py: all ranks in one process, on the emulator or on one GPU; and the results that are kept of it."""

from __future__ import annotations

import ctypes
import itertools
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import on_device_backends
from bench_cells import require_link

from deep_a2a.benchmark.record import ResultFile

pytest.importorskip("deep_a2a._emulated", reason="the emulator was not built")

BENCH = Path(__file__).parents[1] / "bench"
TINY = "--devices 0,0 --num-tokens 6 --hidden 128 --num-topk 2 --num-experts 8 --num-sms 1"
DEADLINE_S = 120
Main = Callable[[list[str]], int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("CUDA_MODULE_LOADING", "")  # which are set by the command
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    function: Main = runpy.run_path(str(BENCH / "kernels.py"))["main"]
    return function


@on_device_backends
def test_records(backend: str, tmp_path: Path) -> None:
    """Every cell has its record, complete, in the file and in the table. The process is its own: it can be ended."""
    path = tmp_path / "results.json"
    arguments = f"{TINY} --backend {backend} --layout rank expert padded --json {path}"
    command = [sys.executable, str(BENCH / "kernels.py"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    results = ResultFile.read(path)
    assert results.command == f"python bench/kernels.py {arguments}"
    cells = [(r.layout, r.op, r.cached, r.dtype) for r in results.records]
    dispatches = [("dispatch", *mode) for mode in itertools.product((False, True), ("bf16", "fp8", "fp8_cast"))]
    one_layout = [*dispatches, ("combine", False, "bf16")]
    assert cells == [(layout, *each) for layout in ("rank", "expert", "padded") for each in one_layout]
    assert torch.__version__.startswith(str(results.machine["torch"]))
    assert len(done.stdout.split("\n\n")[0].splitlines()) == 2 + len(cells)
    for record in results.records:
        assert (record.backend, record.num_sms, record.num_tokens, record.stream) == (backend, 1, 6, "current")
        assert record.devices == (0, 0) and record.num_gpus == (1 if backend == "cuda" else None)
        assert record.total_us > 0 and record.slowest_us is None
        assert not record.checked and record.num_iters == 8 and record.run is None
        row_bytes = 128 * 2 if record.dtype == "bf16" else 128 + 4
        assert record.wire_bytes.nvlink % row_bytes == 0 and record.wire_bytes.nvlink <= 6 * row_bytes
        assert record.logical_bytes % row_bytes == 0 and 0 < record.logical_bytes <= 2 * 6 * row_bytes
        require_link(record, results.machine["link"])


def test_rows_of_rank_0(main: Main) -> None:
    """Counted by hand: 3 ranks of 2 experts, two tokens each."""
    kernels = runpy.run_path(str(BENCH / "kernels.py"))
    cell = kernels["Cell"](num_ranks=3, ranks_per_node=3, num_experts=6, num_topk=2)
    idx = [torch.tensor(each) for each in ([[0, 1], [1, 5]], [[0, 1], [2, 3]], [[4, 0], [1, 2]])]
    rows = kernels["Rows"].of(cell, idx)
    assert (rows.sent, rows.received, rows.own) == (1, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--devices 0,x", "devices is '0,x'; expected numbers with commas, as in 0,1,1,1"),
        ("--devices 0", "devices is 0; expected two or more, one for each rank, each less than 1"),
        ("--devices 0,1", "devices is 0,1; expected two or more, one for each rank, each less than 1"),
        ("--devices=-1,0", "devices is -1,0; expected two or more"),
        ("--devices 0,0,0", "num_ranks is 3, which does not divide num_experts=8"),
        ("--num-sms 1 9", "num_sms is 9; expected at most 8 with devices 0,0: the ranks of a device divide its SMs"),
        ("--num-sms 0", "num_sms is 0; expected 1 or more"),
        ("--num-tokens 0", "num_tokens is 0; expected 1 or more"),
        ("--flush", "flush is given with backend emulated, which has no caches; expected backend cuda"),
        ("--num-topk 9", "num_topk is 9; expected at most num_experts=8"),
        ("--hidden 20", "hidden is 20: a bf16 row has 40 bytes; expected a multiple of 16"),
        ("--iters 7", "iters is 7; expected 8 or more"),
        ("--dtype fp4", "invalid choice: 'fp4'"),
        ("--layout rows", "invalid choice: 'rows'"),
        ("--op reduce", "invalid choice: 'reduce'"),
    ],
)
def test_bad_arguments(main: Main, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*TINY.split(), "--backend", "emulated", *arguments.split()])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


class Driver:
    """Stands in for the CUDA driver: a device of 69 SMs, which come in seven groups of 8 and more."""

    groups = (8, 9, 10, 11, 12, 8, 9)

    def __init__(self) -> None:
        self.described: list[list[int]] = []

    def cuDeviceGet(self, ordinal: Any, device: int) -> int:  # noqa: N802
        ordinal._obj.value = device
        return 0

    def cuDeviceGetDevResource(self, ordinal: Any, resource: Any, kind: int) -> int:  # noqa: N802
        assert (ordinal.value, kind) == (1, 1)
        resource._obj.sm_count = 69
        return 0

    def cuDevSmResourceSplitByCount(self, result: Any, count: Any, whole: Any, *rest: Any) -> int:  # noqa: N802
        assert whole._obj.sm_count == 69 and rest == (None, 0, 8)
        count._obj.value = len(self.groups)
        for group, num_sms in zip(result or (), self.groups, strict=False):
            group.sm_count = num_sms
        return 0

    def cuDevResourceGenerateDesc(self, description: Any, groups: Any, count: int) -> int:  # noqa: N802
        assert count == len(groups)
        self.described.append([group.sm_count for group in groups])
        description._obj.value = len(self.described)
        return 0

    def cuGreenCtxCreate(self, context: Any, description: Any, ordinal: Any, flags: int) -> int:  # noqa: N802
        assert (ordinal.value, flags) == (1, 1)
        context._obj.value = 10 + description.value
        return 0

    def cuGreenCtxStreamCreate(self, stream: Any, context: Any, flags: int, priority: int) -> int:  # noqa: N802
        assert (flags, priority) == (1, 0)
        stream._obj.value = 100 + context.value
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        return 0 if stream.value == 111 else 700


def test_parts_of_a_shared_gpu(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of SMs go round the ranks, as many to each; errors name the option, or the driver's function."""
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    module = runpy.run_path(str(BENCH / "sm_partitions.py"))
    resource = module["_Resource"]
    assert (ctypes.sizeof(resource), resource.sm_count.offset) == (144, 96)  # CUdevResource of cuda.h
    partition_streams = module["partition_streams"]
    first, second = partition_streams(1, 2)
    assert driver.described == [[8, 10, 12], [9, 11, 8]]
    assert (first.num_sms, second.num_sms, first.handle, second.handle) == (30, 28, 111, 112)
    first.synchronize()
    with pytest.raises(RuntimeError, match="cuStreamSynchronize failed with error 700"):
        second.synchronize()
    with pytest.raises(ValueError, match="devices has device 1 8 times; expected at most 7, the parts of its SMs"):
        partition_streams(1, 8)
    monkeypatch.delattr(Driver, "cuGreenCtxCreate")
    with pytest.raises(RuntimeError, match="the CUDA driver has no cuGreenCtxCreate"):
        partition_streams(1, 3)


@pytest.mark.parametrize("name", ["h200x2-4ranks", "h200x2-4ranks-before"])
def test_kept_results(name: str) -> None:
    """What a record says of the link was measured in its run; every cell is there once."""
    results = ResultFile.read(BENCH / "results" / f"{name}.json")
    cells = {(r.op, r.dtype, r.layout, r.cached, r.num_tokens, r.num_sms) for r in results.records}
    assert len(cells) == len(results.records)
    for record in results.records:
        require_link(record, [speed for speed in results.machine["link"] if speed.get("run") == record.run])
        assert record.devices == (0, 1, 1, 1) and record.num_gpus == results.machine["gpus"] == 2
