"""Which ranks the benchmark starts or is: by options, torchrun's environment, or srun's; and that these ranks meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch.distributed as dist

from deep_a2a.benchmark.hosts import Hosts
from deep_a2a.benchmark.launch import Launch, find_launch, first_host
from deep_a2a.benchmark.launcher import run_ranks
from deep_a2a.benchmark.record import ResultFile

DEADLINE_S = 120
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "40007", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip
ONE_EACH = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}


def test_alone() -> None:
    launch = find_launch({})
    assert launch == Launch() == find_launch({}, num_hosts=1) and launch.is_local and launch.is_alone
    assert launch.with_ranks(None, 4).num_ranks == 4 and launch.with_ranks(6, 4).num_ranks == 6
    with pytest.raises(ValueError, match=r"not settled: with_ranks\(\) comes first"):
        _ = launch.num_ranks


def test_torchrun() -> None:
    launch = find_launch({**TORCHRUN, **SRUN})  # torchrun itself may be a task of srun's
    assert launch == Launch(2, 1, 4, 5, "env://", "torchrun")
    assert not launch.is_local and not launch.is_alone
    assert launch.with_ranks(8, 1) == launch.with_ranks(None, 1) == launch
    with pytest.raises(ValueError, match="num_ranks is 4, but torchrun started 8 ranks"):
        launch.with_ranks(4, 1)


def test_srun() -> None:
    assert find_launch(SRUN) == Launch(2, 1, 4, 5, "tcp://gpu07:20007", "srun")
    given = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert find_launch(given).meeting_point == "tcp://10.0.0.1:1234"
    for alone in ({"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_ID": None}):
        environment = {name: text for name, text in {**SRUN, **alone}.items() if text is not None}
        assert find_launch(environment) == Launch()


def test_hosts_by_options() -> None:
    launch = find_launch({}, 2, 1, "node0:29500")
    assert launch == Launch(2, 1, meeting_point="tcp://node0:29500")
    assert launch.with_ranks(8, 1).ranks_per_host == 4 and launch.with_ranks(None, 3).num_ranks == 6
    assert find_launch(ONE_EACH, 2) == Launch(2, 1, meeting_point="tcp://gpu07:20007")
    assert find_launch(ONE_EACH, 2, 0, "a:1") == Launch(2, 0, meeting_point="tcp://a:1")
    for host in ("localhost", "127.0.1.1", "[::1]"):
        assert find_launch({}, 2, 0, f"{host}:29500").is_local
    with pytest.raises(ValueError, match="num_ranks is 3; expected a multiple of nnodes=2"):
        launch.with_ranks(3, 1)


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({}, (None, 1, None), "--node-rank is 1, but there is no --nnodes"),
        ({}, (None, None, "a:1"), "--rendezvous is a:1, but there is no --nnodes"),
        ({}, (0, None, None), "--nnodes is 0; expected 1 or more"),
        ({}, (1, 1, None), "--node-rank is 1, --rendezvous None; expected neither with --nnodes 1"),
        ({}, (2, None, "a:1"), "--node-rank is None; expected 0 to 1"),
        ({}, (2, 2, "a:1"), "--node-rank is 2; expected 0 to 1"),
        ({}, (2, 1, None), "--rendezvous is missing; expected HOST:PORT of node 0"),
        ({}, (2, 1, "a"), "--rendezvous is 'a'; expected HOST:PORT"),
        ({}, (2, 1, "a:70000"), "--rendezvous is 'a:70000'; expected HOST:PORT"),
        (TORCHRUN, (2, 1, "a:1"), "--nnodes is 2, but torchrun started this process as rank 5 of 8"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, (), "but not LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "RANK": "five"}, (), "RANK is 'five' in the environment; expected a number"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, (), "WORLD_SIZE 8, LOCAL_WORLD_SIZE 3; expected as many ranks on each"),
        ({**TORCHRUN, "RANK": "8"}, (), "RANK is 8, WORLD_SIZE 8"),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "3"}, (), "SLURM_STEP_NUM_TASKS is 8, SLURM_STEP_NUM_NODES 3"),
        (SRUN, (2, None, None), "--nnodes is 2, but srun started 8 tasks on 2 nodes; expected one task on each"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, (), "but not SLURM_PROCID, SLURM_STEP_NUM_NODES"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, (), "SLURM_STEP_NODELIST is ''; expected names of hosts"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(
    environment: Mapping[str, str], options: tuple[int | None, int | None, str | None], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        find_launch(environment, *options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [("a", "a"), ("a,b", "a"), ("a[03-05,9],b", "a03"), ("a[7,9-10]-ib", "a7-ib"), ("gpu-1-[2-3].x,b", "gpu-1-2.x")],
)
def test_first_host(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_nodes_lie_on_hosts() -> None:
    hosts = Hosts(["a", "a", "a", "a", "b", "b", "b", "b"])
    assert hosts.count == 2 and [hosts.local_rank(rank) for rank in (0, 3, 4, 7)] == [0, 3, 0, 3]
    for fitting in (1, 2, 4):
        hosts.require_whole_nodes(fitting)
    with pytest.raises(ValueError, match=r"ranks_per_node is 8, but ranks 0 to 7 are on 2 hosts; .* at most 4 of them"):
        hosts.require_whole_nodes(8)
    with pytest.raises(ValueError, match="ranks_per_node is 2, but ranks 0 to 1 are on 2 hosts"):
        Hosts(["a", "b", "a", "b"]).require_whole_nodes(2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def of_torchrun(host: int, port: int) -> tuple[dict[str, str], str]:
    ranks = {"RANK": str(host), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, "--ranks-per-node 1"


def of_srun(host: int, port: int) -> tuple[dict[str, str], str]:
    step = {"SLURM_STEP_ID": "3", "SLURM_PROCID": str(host), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    return {**step, "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}, ""


def of_options(host: int, port: int) -> tuple[dict[str, str], str]:
    return {}, f"--num-ranks 2 --nnodes 2 --node-rank {host} --rendezvous 127.0.0.1:{port}"


@pytest.mark.parametrize("way", [of_torchrun, of_srun, of_options])
def test_commands_meet(way: Callable[[int, int], tuple[dict[str, str], str]], tmp_path: Path) -> None:
    """Two commands are two ranks, or start one each; the first of them prints and writes, and says what was run."""
    port, path = free_port(), tmp_path / "results.json"
    shape = "--num-tokens 8 --hidden 64 --num-topk 2 --num-experts 4 --iters 1 --warmup 0 --backend cpu"
    commands = []
    for host in range(2):
        environment, options = way(host, port)
        arguments = f"bench {shape} {options} --json {path.with_stem(f'results{host}')}"
        commands.append(
            subprocess.Popen(
                [sys.executable, "-m", "deep_a2a.cli", *arguments.split()],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        printed = [command.communicate(timeout=DEADLINE_S) for command in commands]
    finally:
        for command in commands:
            command.kill()
    assert [command.returncode for command in commands] == [0, 0], printed
    assert "dispatch" in printed[0][0] and printed[1][0] == ""
    results = ResultFile.read(tmp_path / "results0.json")
    assert [(record.op, record.num_nodes, record.checked) for record in results.records] == [
        ("dispatch", 2, True),
        ("combine", 2, True),
    ]
    assert not (tmp_path / "results1.json").exists()


def own_rank(group: dist.ProcessGroup, _: object) -> int:
    return dist.get_rank(group)


def test_a_host_that_does_not_come() -> None:
    start = time.monotonic()
    launch = Launch(2, 0, 1, meeting_point=f"tcp://127.0.0.1:{free_port()}")
    with pytest.raises(Exception, match=r"[Tt]imed out"):
        run_ranks(own_rank, None, launch, timeout_s=2.0)
    assert time.monotonic() - start < 30
