"""What the cells of a run share on one rank: where its tensors are, gates, the links' speeds, and routings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from deep_a2a.benchmark import plain
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.fabric import Fabric
from deep_a2a.benchmark.hosts import Hosts
from deep_a2a.benchmark.place import Place
from deep_a2a.benchmark.record import Backend
from deep_a2a.benchmark.workload import Routing, Workload

_NCCL_TIMEOUT_S = 60
_TIMEOUT_S = {"cpu": 300.0, "cuda": 20.0, "emulated": 120.0}


@dataclass(frozen=True)
class Routed:
    """By iteration, warm-up included: the routing, and what this rank receives of it."""

    routings: list[Routing]
    received: list[plain.ReceivedRows]


class Session:
    """One rank's share of a run. Collective, as are its methods and the gates. `open` comes first, within `place`."""

    def __init__(self, group: dist.ProcessGroup, backend: Backend) -> None:
        self.group, self.rank, self.num_ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.hosts = Hosts.of(group)
        if backend != "cuda" and self.hosts.count > 1:
            raise ValueError(f"backend is {backend}, but the ranks are on {self.hosts.count} hosts; expected one")
        self.place = Place.of(backend, group, self.hosts)
        self.timeout_s = _TIMEOUT_S[backend]
        self.fabrics: dict[int, Fabric] = {}
        self.rows_group: dist.ProcessGroup | None = None
        self._routed: dict[tuple[object, ...], Routed] = {}

    def open(self, ranks_per_node: Iterable[int] | None = None, num_sms: Iterable[int] = ()) -> None:
        """Makes gates for nodes of these sizes (by default all ranks are one), and measures their links.

        num_sms: what the cells take, on which the network is measured too. Raises ValueError where a node would not lie
        on one host.
        """
        sizes = sorted({*(ranks_per_node or [self.num_ranks])}, reverse=True)
        for size in sizes:
            self.hosts.require_whole_nodes(size)
        self.rows_group = self._make_rows_group()
        if self.place.backend == "cpu":
            return
        for size in sizes:
            self.fabrics[size] = Fabric(self.group, self.place, size, self.timeout_s)
            self.fabrics[size].measure(num_sms)

    def close(self) -> None:
        """Nobody frees memory that another rank may still be looking at."""
        dist.barrier(group=self.group)
        if self.rows_group is not None and self.rows_group is not self.group:
            dist.destroy_process_group(self.rows_group)
        self.rows_group = None
        self.fabrics.clear()

    def fabric(self, cell: Cell) -> Fabric | None:
        """What connects the cell's nodes; None on the cpu backend, which has neither streams nor links."""
        return None if self.place.backend == "cpu" else self.fabrics[cell.ranks_per_node]

    @property
    def baseline_name(self) -> str | None:
        """None where there is no baseline: NCCL refuses ranks that share a GPU."""
        if self.rows_group is None:
            return None
        if self.place.backend == "cpu":
            return "gloo all_to_all_single"
        return f"{'nccl' if self.place.backend == 'cuda' else 'gloo'} all_to_all_single, counts known"

    def give_up_baseline(self) -> None:
        """From here on there is none. On every rank alike."""
        self.rows_group = None

    def routed(self, cell: Cell) -> Routed:
        """The routings of a cell, on this rank's device; cells that route alike share them. Collective."""
        key = (
            cell.routing, cell.num_tokens, cell.num_experts, cell.num_topk, cell.num_ranks, cell.num_nodes,
            cell.topk_groups, cell.seed, cell.cached, cell.num_warmup + cell.num_iters,
        )  # fmt: skip
        if key not in self._routed:
            self._routed[key] = self._route(cell)
        return self._routed[key]

    def _route(self, cell: Cell) -> Routed:
        workload = Workload(cell)
        num_iters = cell.num_warmup + cell.num_iters
        own = [workload.routing_of(i, self.rank) for i in range(1 if cell.cached else num_iters)]
        by_rank = [
            self._gathered(torch.stack([pair[part] for pair in own])) for part in range(2)
        ]  # [ids or weights][rank][iteration]
        routings = [
            Routing([idx[i] for idx in by_rank[0]], [weights[i] for weights in by_rank[1]]) for i in range(len(own))
        ]
        received = [plain.received_rows(cell, routing, self.rank) for routing in routings]
        repeats = num_iters // len(own)
        return Routed(routings * repeats, received * repeats)

    def _gathered(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of each rank; on this rank's device."""
        parts = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(parts, mine, group=self.group)
        return [part.to(self.place.device) for part in parts]

    def _make_rows_group(self) -> dist.ProcessGroup | None:
        if self.place.backend != "cuda":
            return self.group
        if self.place.num_gpus != self.num_ranks:
            return None
        group: dist.ProcessGroup = dist.new_group(backend="nccl", timeout=timedelta(seconds=_NCCL_TIMEOUT_S))
        return group
