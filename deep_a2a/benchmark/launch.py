"""Which ranks a process is to start, or is: as the options say, or torchrun's environment, or that of srun."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")
_FIRST_PORT, _NUM_PORTS = 20000, 20000
_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|\[?::1\]?")


@dataclass(frozen=True)
class Launch:
    """Every host has the same number of ranks; those of host `h` come before those of host `h + 1`.

    Attributes:
        num_hosts, host_idx: hosts of the run, and which of them this is.
        ranks_per_host: None until `with_ranks` has settled it.
        rank: the one that this process is; None if it starts those of its host.
        meeting_point: a URL for `init_process_group`; None for a file, which one host has.
        started_by: who has started the ranks, for messages.
    """

    num_hosts: int = 1
    host_idx: int = 0
    ranks_per_host: int | None = None
    rank: int | None = None
    meeting_point: str | None = None
    started_by: str = "this command"

    def with_ranks(self, num_ranks: int | None, default_per_host: int) -> Launch:
        """With as many ranks as are asked for; ValueError where that does not go with what was started."""
        if num_ranks is None:
            return self if self.ranks_per_host is not None else replace(self, ranks_per_host=default_per_host)
        if self.ranks_per_host is not None and num_ranks != self.num_ranks:
            raise ValueError(f"num_ranks is {num_ranks}, but {self.started_by} started {self.num_ranks} ranks")
        if num_ranks < 1 or num_ranks % self.num_hosts:
            raise ValueError(f"num_ranks is {num_ranks}; expected a multiple of nnodes={self.num_hosts}, 1 or more")
        return replace(self, ranks_per_host=num_ranks // self.num_hosts)

    @property
    def num_ranks(self) -> int:
        return self.num_hosts * self.local_ranks

    @property
    def local_ranks(self) -> int:
        """Ranks of a host."""
        if self.ranks_per_host is None:
            raise ValueError("the number of ranks is not settled: with_ranks() comes first")
        return self.ranks_per_host

    @property
    def is_alone(self) -> bool:
        """Whether this process starts all ranks, and so may do it again: nobody else takes part."""
        return self.num_hosts == 1 and self.rank is None

    @property
    def is_local(self) -> bool:
        """Whether all processes reach each other over the loopback interface."""
        if self.num_hosts == 1 or self.meeting_point is None:
            return True
        host = self.meeting_point.removeprefix("tcp://").rpartition(":")[0]
        return _LOOPBACK.fullmatch(host) is not None


def find_launch(
    environment: Mapping[str, str],
    num_hosts: int | None = None,
    host_idx: int | None = None,
    rendezvous: str | None = None,
) -> Launch:
    """What the options --nnodes, --node-rank and --rendezvous say, if there are any, or else the environment.

    Raises ValueError, naming the option or the variable, for what does not go together.
    """
    torchrun = {"RANK", "WORLD_SIZE"} <= environment.keys()
    if num_hosts is None:
        for name, value in (("node-rank", host_idx), ("rendezvous", rendezvous)):
            if value is not None:
                raise ValueError(f"--{name} is {value}, but there is no --nnodes; expected both or neither")
        if torchrun:
            return _of_torchrun(environment)
        return _of_srun(environment) if _num_tasks(environment) > 1 else Launch()
    if torchrun:
        raise ValueError(
            f"--nnodes is {num_hosts}, but torchrun started this process as rank {environment['RANK']} of "
            f"{environment['WORLD_SIZE']}; expected --nnodes to be given to torchrun alone"
        )
    if num_hosts < 1:
        raise ValueError(f"--nnodes is {num_hosts}; expected 1 or more")
    if num_hosts == 1:
        if host_idx not in (None, 0) or rendezvous is not None:
            raise ValueError(f"--node-rank is {host_idx}, --rendezvous {rendezvous}; expected neither with --nnodes 1")
        return Launch()
    return _of_options(environment, num_hosts, host_idx, rendezvous)


def _of_options(environment: Mapping[str, str], num_hosts: int, host_idx: int | None, rendezvous: str | None) -> Launch:
    if "SLURM_STEP_ID" in environment and host_idx is None:
        tasks = _num_tasks(environment)
        if tasks != num_hosts or _number(environment, "SLURM_STEP_NUM_NODES") != num_hosts:
            raise ValueError(
                f"--nnodes is {num_hosts}, but srun started {tasks} tasks on {environment['SLURM_STEP_NUM_NODES']} "
                "nodes; expected one task on each (--ntasks-per-node 1), or a task for each rank and no --nnodes"
            )
        host_idx = _number(environment, "SLURM_PROCID")
        rendezvous = rendezvous or _slurm_rendezvous(environment)
    if host_idx is None or not 0 <= host_idx < num_hosts:
        raise ValueError(f"--node-rank is {host_idx}; expected 0 to {num_hosts - 1}, with --nnodes {num_hosts}")
    if rendezvous is None:
        raise ValueError(f"--rendezvous is missing; expected HOST:PORT of node 0, with --nnodes {num_hosts}")
    return Launch(num_hosts, host_idx, meeting_point=_meeting_point(rendezvous))


def _of_torchrun(environment: Mapping[str, str]) -> Launch:
    _require(environment, _TORCHRUN, "RANK and WORLD_SIZE")
    rank, num_ranks, per_host = (_number(environment, name) for name in _TORCHRUN[:3])
    if per_host < 1 or num_ranks % per_host or not 0 <= rank < num_ranks:
        raise ValueError(
            f"RANK is {rank}, WORLD_SIZE {num_ranks}, LOCAL_WORLD_SIZE {per_host}; expected as many ranks on each node"
        )
    # Where torchrun's agents have met already they lend the ranks their store, which only "env://" finds.
    return Launch(num_ranks // per_host, rank // per_host, per_host, rank, "env://", "torchrun")


def _of_srun(environment: Mapping[str, str]) -> Launch:
    _require(environment, _SLURM, "SLURM_STEP_ID")
    rank, num_ranks, num_hosts = (_number(environment, name) for name in _SLURM)
    if num_ranks % num_hosts:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS is {num_ranks}, SLURM_STEP_NUM_NODES {num_hosts}; expected as many tasks on each "
            "node (--ntasks-per-node)"
        )
    per_host = num_ranks // num_hosts
    meeting_point = _meeting_point(_slurm_rendezvous(environment))
    return Launch(num_hosts, rank // per_host, per_host, rank, meeting_point, "srun")


def _num_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the step that this process is in; 0 outside of one, as in a batch script itself."""
    return _number(environment, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_ID" in environment else 0


def _slurm_rendezvous(environment: Mapping[str, str]) -> str:
    """MASTER_ADDR and MASTER_PORT where they are set; else the first host of the step, where task 0 is."""
    host = environment.get("MASTER_ADDR")
    if host is None:
        _require(environment, ("SLURM_STEP_NODELIST",), "SLURM_STEP_ID, but not MASTER_ADDR")
        host = first_host(environment["SLURM_STEP_NODELIST"])
    if "MASTER_PORT" in environment:
        return f"{host}:{environment['MASTER_PORT']}"
    _require(environment, ("SLURM_JOB_ID",), "SLURM_STEP_ID, but not MASTER_PORT")
    return f"{host}:{_FIRST_PORT + _number(environment, 'SLURM_JOB_ID') % _NUM_PORTS}"


def first_host(node_list: str) -> str:
    """Of a list as Slurm writes it: "a[03-05,9],b" begins with "a03"."""
    found = re.match(r"([^,\[]+)(?:\[([^],-]+)[^]]*\])?([^,\[]*)", node_list)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {node_list!r}; expected names of hosts")
    return "".join(part or "" for part in found.groups())


def _meeting_point(rendezvous: str) -> str:
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"--rendezvous is {rendezvous!r}; expected HOST:PORT, as in node0:29500")
    return f"tcp://{rendezvous}"


def _require(environment: Mapping[str, str], names: tuple[str, ...], given: str) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        raise ValueError(f"the environment has {given}, but not {', '.join(missing)}; expected all of them")


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r} in the environment; expected a number")
    return int(text)
