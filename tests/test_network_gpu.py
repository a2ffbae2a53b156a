"""Puts over real NVSHMEM, by ranks that are programs of their own, on as many GPUs as there are: over NVLink, and over
the network of loopback.py."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import loopback
import pytest

pytestmark = pytest.mark.skipif(find_spec("deep_a2a._nvshmem") is None, reason="this build has no _nvshmem")

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 150.0


def environment_of(rank: int, ranks_per_node: int, network: str) -> dict[str, str]:
    """For a rank's program."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if network == "remote":
        environment |= loopback.environment() | loopback.of_rank(rank, ranks_per_node)
    environment.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "lo")
    return environment


def run_ranks(num_ranks: int, ranks_per_node: int, network: str, rounds: int, directory: Path) -> list[str]:
    """What each rank printed. All have to end well within the deadline."""
    command = [sys.executable, str(ROOT / "tests" / "network_rank.py"), f"--num-ranks={num_ranks}"]
    command += [f"--ranks-per-node={ranks_per_node}", f"--rounds={rounds}", f"--network={network}"]
    command += [f"--store={directory / 'store'}", "--timeout=40"]
    ranks = [
        subprocess.Popen(
            [*command, f"--rank={rank}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment_of(rank, ranks_per_node, network),
        )
        for rank in range(num_ranks)
    ]
    try:
        shown = [rank.communicate(timeout=DEADLINE_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = "\n".join(f"---- rank {i} ----\n{text}" for i, text in enumerate(shown) if ranks[i].returncode != 0)
    assert not failed, failed
    return shown


@pytest.mark.gpu
@pytest.mark.parametrize("nodes", ["2x1", "2x2", "4x1"])
def test_puts_over_nvlink(nodes: str, tmp_path: Path) -> None:
    num_nodes, ranks_per_node = map(int, nodes.split("x"))
    shown = run_ranks(num_nodes * ranks_per_node, ranks_per_node, "mapped", 40, tmp_path)
    assert all("bytes in 40 rounds" in text for text in shown)


@pytest.mark.gpu
@pytest.mark.skipif(loopback.DIRECTORY is None, reason="DEEP_A2A_LOOPBACK_NETWORK is not set")
@pytest.mark.parametrize("nodes", ["2x1", "2x2"])
def test_puts_over_a_network(nodes: str, tmp_path: Path) -> None:
    num_nodes, ranks_per_node = map(int, nodes.split("x"))
    shown = run_ranks(num_nodes * ranks_per_node, ranks_per_node, "remote", 12, tmp_path)
    assert all("by proxy thread" in text for text in shown), shown
