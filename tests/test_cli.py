"""The command `deep-a2a`: its subcommands, and that `info` answers whatever is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import deep_a2a
from deep_a2a import cli, info


@pytest.mark.parametrize(("command", "option"), [("info", "--json"), ("demo", "--steps"), ("bench", "--num-tokens")])
def test_help_of_each_command(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: deep-a2a {command}") and option in printed


def test_help_lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in ("info", "demo", "bench"))


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "required: COMMAND"), (["benchmark"], "invalid choice: 'benchmark'")]
)
def test_no_such_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_options_go_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], str]] = []

    def demo(argv: Sequence[str], prog: str) -> int:
        calls.append((list(argv), prog))
        return 7

    monkeypatch.setattr("deep_a2a.demo.main", demo)
    assert cli.main(["demo", "--steps", "3", "--seed=4"]) == 7
    assert calls == [(["--steps", "3", "--seed=4"], "deep-a2a demo")]


def test_info_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for section in ("versions", "machine", "backends", "transports", "limits", "optional"):
        assert section in lines
    rows = {line[:16].strip(): line for line in lines if line.startswith("  ") and line[2] != " "}
    assert " yes " in rows["cpu"] and " yes " in rows["shm"] and " yes " in rows["memfd"]
    assert " yes " in rows["emulated"]
    if not torch.cuda.is_available():
        assert " no " in rows["cuda"] and 'backend="cpu"' in rows["cuda"]
    assert deep_a2a.__version__ in rows["deep_a2a"]


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    findings = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert findings["cpu"]["available"] is True and findings["cpu"]["section"] == "backends"
    for item in findings.values():
        assert set(item) == {"section", "name", "available", "detail", "remedy"}
        assert isinstance(item["detail"], str) and item["detail"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_info_of_which_the_end_is_not_read(options: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "deep_a2a.cli", "info", *options]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, "")


def answers() -> dict[str, info.Answer]:
    return {finding.name: finding.answer for finding in info.collect()}


def test_info_without_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "package_version", lambda name: None)
    found = answers()
    for name, remedy in (("nvshmem", "[cu13]"), ("cupy", "[cu12]"), ("matplotlib", "[bench]"), ("torch", "torch")):
        assert not found[name].available and remedy in (found[name].remedy or ""), name


def test_info_says_which_nvshmem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "package_version", {"nvidia-nvshmem-cu12": "3.4.5"}.get)
    assert answers()["nvshmem"].available and "nvidia-nvshmem-cu12 3.4.5" in answers()["nvshmem"].detail


def test_info_without_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_a2a._cpu", None)
    found = answers()
    assert not found["cpu"].available and not found["shm"].available
    assert "C++17" in (found["cpu"].remedy or "")


def test_info_survives_any_probe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("no such thing here")

    monkeypatch.delattr("os.memfd_create")
    for name in ("cpu_model", "memory_bytes", "package_version", "num_usable_cores"):
        monkeypatch.setattr(info, name, fail)
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/no/such/nvcc")
    found = answers()
    assert found["memory"].detail == "could not find out: OSError: no such thing here"
    assert not found["memfd"].available and not found["nvcc"].available
    assert cli.main(["info"]) == 0
    assert "could not find out" in capsys.readouterr().out


def run_without_native(code: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules['deep_a2a._cpu'] = None; {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_info_works_without_native_module() -> None:
    shown = run_without_native("from deep_a2a.cli import main; sys.exit(main(['info']))")
    assert shown.returncode == 0, shown.stderr
    assert "the native module does not load" in shown.stdout and "pip install" in shown.stdout


def test_without_native_module_a_use_says_what_to_do() -> None:
    for code in ("from deep_a2a import Buffer", "import deep_a2a; deep_a2a.Buffer"):
        shown = run_without_native(code)
        assert shown.returncode == 1 and "ImportError: deep_a2a was imported from" in shown.stderr, shown.stderr
