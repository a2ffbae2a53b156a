"""How ranks on GPUs of one host share their windows: by handles of CUDA IPC, which go through the group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deep_a2a.arrays import Device
from deep_a2a.bootstrap import Member, host_identity, require_one_host, together
from deep_a2a.cuda_backend import CudaBackend
from deep_a2a.errors import CommError
from deep_a2a.group import Group
from deep_a2a.memory import check_affordable, format_bytes
from deep_a2a.settings import Settings
from deep_a2a.streams import StreamChoice

if TYPE_CHECKING:
    from deep_a2a import _cuda


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
        if settings.ranks_per_node != settings.num_ranks:
            raise ValueError(
                f"ranks_per_node must be the number of ranks, {settings.num_ranks}, with backend {self.name!r}, got "
                f"{settings.ranks_per_node}: traffic between nodes needs the NVSHMEM transport, which this version "
                "does not have"
            )
        require_one_host(members, group.rank, self.name)
        if self.device.kind == "cpu":
            check_affordable(nbytes, len(members))
        together(group, lambda: self._check_peers(members, group.rank), timeout_s, "reach its peers")
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
            ranks.append(self._start(settings, group.rank, windows, timeout_s))

        together(group, open_all, timeout_s, "open the windows of its peers")
        return CudaBackend(
            self._native,
            ranks[0],
            settings,
            self.device,
            self._ordinal,
            created[0],
            timeout_s,
            self._num_sms,
            self._choice,
        )

    def close(self) -> None:
        pass

    def _check_peers(self, members: list[Member], rank: int) -> None:
        """Every other GPU can be reached. Those that this process does not see are found out about when opened."""
        mine = members[rank]
        seen = {self._native.pci_bus_id(idx): idx for idx in range(self._native.device_count())}
        for other, member in enumerate(members):
            peer = seen.get(member["bus_id"])
            if peer is None or peer == self._ordinal or self._native.can_access_peer(self._ordinal, peer):
                continue
            raise CommError(
                f"the GPUs of rank {rank} ({_named(mine)}) and rank {other} ({_named(member)}) have no peer access to "
                "each other: backend 'cuda' needs NVLink, or PCIe with peer-to-peer access, between all GPUs"
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

    def _start(self, settings: Settings, rank: int, windows: list[_cuda.Window], timeout_s: float) -> _cuda.Rank:
        engine: _cuda.Rank = self._native.Rank(
            shape=settings.shape(),
            rank=rank,
            device=self._ordinal,
            windows=windows,
            timeout_s=timeout_s,
            delay_seed=self._delay_seed,
        )
        if self._num_sms > engine.num_sms:
            raise ValueError(f"num_sms must be None or at most the device's {engine.num_sms}, got {self._num_sms}")
        return engine


def _named(member: Member) -> str:
    return f"device {member['device']}, {member['bus_id']}"
