"""How ranks on GPUs share their windows: on one node by handles of CUDA IPC, which go through the group; with several
nodes windows lie in NVSHMEM's symmetric memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deep_a2a import nvshmem_environment, nvshmem_job, nvshmem_memory
from deep_a2a.arrays import Device
from deep_a2a.bootstrap import Member, host_identity, require_one_host, together
from deep_a2a.cuda_backend import CudaBackend
from deep_a2a.errors import CommError
from deep_a2a.group import Group
from deep_a2a.memory import check_affordable, format_bytes
from deep_a2a.nvshmem_library import load
from deep_a2a.settings import Settings
from deep_a2a.streams import StreamChoice

if TYPE_CHECKING:
    from deep_a2a import _cuda


_USUAL_SMS = 12  # when nothing is said: as in csrc/cuda/tuning.cpp


@dataclass(frozen=True)
class Rails:
    """By node, with several: the rail peer's PE, and its window where rows are stored there rather than put."""

    pes: list[int]
    windows: list[_cuda.Window | None]


class CudaSite:
    """A rank on a GPU, or on an emulated one, that `native` calls `ordinal`. See ``sites.Site``."""

    def __init__(
        self,
        native: Any,
        name: str,
        device: Device,
        ordinal: int,
        *,
        num_sms: int,
        choice: StreamChoice,
        delay_seed: int | None,
    ) -> None:
        self.name = name
        self.device = device
        self._native = native
        self._ordinal = ordinal
        self._num_sms = num_sms
        self._choice = choice
        self._delay_seed = delay_seed

    @property
    def member(self) -> Member:
        return {"host": host_identity(), "device": self._ordinal, "bus_id": self._native.pci_bus_id(self._ordinal)}

    def connect(
        self, group: Group, members: list[Member], settings: Settings, nbytes: int, timeout_s: float
    ) -> CudaBackend:
        first = group.rank - group.rank % settings.ranks_per_node
        neighbours = members[first : first + settings.ranks_per_node]
        require_one_host(neighbours, group.rank - first, self.name, first)
        if self.device.kind == "cpu":
            check_affordable(nbytes, sum(member["host"] == self.member["host"] for member in members))
        together(group, lambda: self._check_peers(neighbours, group.rank - first, first), timeout_s, "reach its peers")
        if settings.num_nodes > 1:
            return self._connect_nodes(group, settings, nbytes, timeout_s)
        created: list[_cuda.Window] = []

        def create() -> str:
            created.append(self._create(nbytes))
            return created[0].handle.hex()

        handles = together(group, create, timeout_s, "create its window")
        windows: list[_cuda.Window] = []
        ranks: list[_cuda.Rank] = []

        def open_all() -> None:
            for rank, handle in enumerate(handles):
                mine = rank == group.rank
                windows.append(created[0] if mine else self._open(handle, nbytes, members, group.rank, rank))
            ranks.append(self._start(self._native, settings, group.rank, windows, timeout_s, Rails([], [])))

        together(group, open_all, timeout_s, "open the windows of its peers")
        return self._backend(self._native, ranks[0], settings, created[0], timeout_s)

    def _connect_nodes(self, group: Group, settings: Settings, nbytes: int, timeout_s: float) -> CudaBackend:
        together(group, lambda: self._network_native() is not None, timeout_s, "load NVSHMEM")
        native = self._network_native()
        if self.device.kind == "cpu":  # the process has one network: the last Buffer's seed counts
            seed = self._delay_seed
            native.set_network_seed(None if seed is None else seed * settings.num_ranks + group.rank)
        job = nvshmem_job.join(
            native,
            group,
            self._ordinal,
            heap_bytes=nbytes,
            num_queues=settings.num_lanes * (self._num_sms or _USUAL_SMS),  # a block puts without waiting for others
            timeout_s=timeout_s,
        )
        windows = nvshmem_memory.allocate(job, group, nbytes, timeout_s)
        locals_ = settings.ranks_per_node
        first = group.rank - group.rank % locals_
        near = windows[first : first + locals_]
        rail = slice(group.rank % locals_, None, locals_)
        stores = self._delay_seed is None and not nvshmem_environment.always_puts()
        rail_windows = windows[rail] if stores else [None] * settings.num_nodes
        ranks: list[Any] = []

        def start() -> None:
            for local, window in enumerate(near):
                if window is None:
                    raise CommError(
                        f"NVSHMEM does not map the memory of rank {first + local} to rank {group.rank} of the same "
                        "node: ranks_per_node must be at most the number of ranks that NVLink connects"
                    )
            rails = Rails(list(job.pes[rail]), rail_windows)
            ranks.append(self._start(native, settings, group.rank, near, timeout_s, rails))

        together(group, start, timeout_s, "start")
        return self._backend(native, ranks[0], settings, windows[group.rank], timeout_s)

    def _network_native(self) -> Any:
        return self._native if self.name == "emulated" else load()[0]

    def _backend(self, native: Any, rank: Any, settings: Settings, window: Any, timeout_s: float) -> CudaBackend:
        return CudaBackend(
            native, rank, settings, self.device, self._ordinal, window, timeout_s, self._num_sms, self._choice
        )

    def close(self) -> None:
        pass

    def _check_peers(self, members: list[Member], rank: int, first: int) -> None:
        """Every other GPU can be reached. Those that this process does not see are found out about when opened."""
        mine = members[rank]
        seen = {self._native.pci_bus_id(idx): idx for idx in range(self._native.device_count())}
        for other, member in enumerate(members):
            peer = seen.get(member["bus_id"])
            if peer is None or peer == self._ordinal or self._native.can_access_peer(self._ordinal, peer):
                continue
            raise CommError(
                f"the GPUs of rank {first + rank} ({_named(mine)}) and rank {first + other} ({_named(member)}) have no "
                "peer access to each other: backend 'cuda' needs NVLink, or PCIe with peer-to-peer access, between all "
                "GPUs of a node"
            )

    def _create(self, nbytes: int) -> _cuda.Window:
        try:
            window: _cuda.Window = self._native.Window.create(nbytes=nbytes, device=self._ordinal)
        except MemoryError as error:
            raise MemoryError(f"a window of {format_bytes(nbytes)} does not fit the memory of {self.device}") from error
        return window

    def _open(self, handle: str, nbytes: int, members: list[Member], rank: int, peer: int) -> _cuda.Window:
        try:
            window: _cuda.Window = self._native.Window.open(
                handle=bytes.fromhex(handle), nbytes=nbytes, device=self._ordinal
            )
        except RuntimeError as error:
            raise CommError(
                f"rank {rank} ({_named(members[rank])}) could not open the window of rank {peer} "
                f"({_named(members[peer])}): {error}"
            ) from error
        return window

    def _start(
        self,
        native: Any,
        settings: Settings,
        rank: int,
        windows: list[_cuda.Window],
        timeout_s: float,
        rails: Rails,
    ) -> _cuda.Rank:
        engine: _cuda.Rank = native.Rank(
            shape=settings.shape(),
            rank=rank,
            device=self._ordinal,
            windows=windows,
            rail_pes=rails.pes,
            rail_windows=rails.windows,
            timeout_s=timeout_s,
            delay_seed=self._delay_seed,
        )
        if self._num_sms > engine.num_sms:
            raise ValueError(f"num_sms must be None or at most the device's {engine.num_sms}, got {self._num_sms}")
        return engine


def _named(member: Member) -> str:
    return f"device {member['device']}, {member['bus_id']}"
