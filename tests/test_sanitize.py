"""sanitize.py without its tool, and with one that finds something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import on_device_backends

pytest.importorskip("deep_a2a._emulated", reason="the emulator was not built")

SCRIPT = Path(__file__).parent / "sanitize.py"


@on_device_backends
def test_rounds_are_compared(backend: str) -> None:
    arguments = ["--tool", "none", "--backend", backend, "--layout", "expert", "--payload", "cast fp8_e4m3:float32"]
    command = [sys.executable, str(SCRIPT), *arguments, "--side", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing found, no bit differs\n")


def test_what_the_tool_finds(tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\nexit 3\n")
    tool.chmod(0o700)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(SCRIPT), "--tool", "racecheck", "--backend", "emulated"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 1 and "the ranks ended with [3, 3]" in done.stdout, done.stdout + done.stderr
