"""bench/host_time.py: every call is timed, and the file says where and how."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from backends import on_device_backends

pytest.importorskip("deep_a2a._emulated", reason="the emulator was not built")

SCRIPT = Path(__file__).parents[1] / "bench" / "host_time.py"
CALLS = [
    "dispatch, host_sync=False",
    "the same, quantize='fp8'",
    "the same, async_op=True",
    "dispatch, waits for counts",
    "dispatch, cached",
    "release",
    "combine",
]


@on_device_backends
def test_lines(backend: str, tmp_path: Path) -> None:
    """The process is its own: it can be ended."""
    path = tmp_path / "host.txt"
    arguments = f"--backend {backend} --calls 3 --file {path}"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments.split()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert path.read_text() == done.stdout
    head, table = done.stdout.split("\n\n")
    assert f"python bench/host_time.py {arguments}" in head and "torch " in head
    lines = [re.fullmatch(r"(\w+) +(\S.*?) +([\d.]+)  \(([\d.]+) to ([\d.]+)\)", line) for line in table.splitlines()]
    found = [match.groups() for match in lines if match is not None]
    assert len(found) == len(lines)
    assert [(layout, name) for layout, name, *_ in found] == [
        *((layout, name) for layout in ("rank", "expert") for name in CALLS),
        ("torch", "empty"),
        ("torch", "add_"),
    ]
    for _, _, median, low, high in found:
        assert 0 < float(low) <= float(median) <= float(high)


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    main: Callable[[list[str]], int] = runpy.run_path(str(SCRIPT))["main"]
    with pytest.raises(SystemExit):
        main(["--calls", "0"])
    assert "--calls is 0; expected 1 or more" in capsys.readouterr().err
