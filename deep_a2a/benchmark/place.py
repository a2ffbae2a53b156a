"""Where the tensors of a rank lie: the host's memory, or a GPU. Ranks take their host's GPUs in turn."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from deep_a2a.benchmark.agreement import agree, attempt
from deep_a2a.benchmark.hosts import Hosts
from deep_a2a.benchmark.record import Backend, StreamName
from deep_a2a.nvshmem_library import load as load_nvshmem

_NATIVE = {"cuda": "deep_a2a._cuda", "emulated": "deep_a2a._emulated"}


@dataclass(frozen=True)
class Place:
    """Of one rank. `num_gpus` is how many GPUs all ranks of the run use together; None where they use none."""

    backend: Backend
    device: torch.device
    num_gpus: int | None

    @staticmethod
    def of(backend: Backend, group: dist.ProcessGroup, hosts: Hosts) -> Place:
        """Collective. MeasurementError on every rank where the backend is "cuda" and a rank has no GPU."""
        if backend != "cuda":
            return Place(backend, torch.device("cpu"), None)
        rank, found = dist.get_rank(group), []

        def find() -> None:
            count = torch.cuda.device_count()
            if count == 0:
                raise RuntimeError("backend is cuda, but torch.cuda.device_count() is 0; expected a GPU")
            device = torch.device("cuda", hosts.local_rank(rank) % count)
            # Processes may see different GPUs under the same number.
            found.append((device, (hosts.names[rank], Place(backend, device, None).bus_id())))

        agree(group, attempt(find))
        device, mine = found[0]
        used: list[tuple[str, str]] = [mine] * dist.get_world_size(group)
        dist.all_gather_object(used, mine, group=group)
        return Place(backend, device, len(set(used)))

    @property
    def device_idx(self) -> int:
        return self.device.index or 0

    def bus_id(self) -> str:
        """What tells the GPU from others of its host."""
        return str(self.native().pci_bus_id(self.device_idx))

    def buffer_options(self, stream: StreamName) -> dict[str, Any]:
        """What a Buffer has to be told besides its shape."""
        if self.backend == "cpu":
            return {}
        return {"stream": stream, **({"device": self.device_idx} if self.backend == "cuda" else {})}

    def native(self) -> ModuleType:
        """The backend's native module; ImportError where it was not built."""
        importlib.import_module("deep_a2a._cpu")  # has the types of the others' arguments
        return importlib.import_module(_NATIVE[self.backend])

    def network_native(self) -> ModuleType:
        """The backend's native module that puts between nodes; ImportError where there is none, saying why."""
        return load_nvshmem()[0] if self.backend == "cuda" else self.native()

    @contextmanager
    def current(self) -> Iterator[None]:
        """The rank's device, and a stream that waits for no other, for as long as the context is open."""
        if self.device.type == "cpu":
            yield
            return
        torch.cuda.set_device(self.device)
        cuda: Any = torch.cuda  # whose streams and events are untyped in some versions
        with cuda.stream(cuda.Stream(self.device)):
            yield
            torch.cuda.synchronize(self.device)

    def synchronize(self) -> None:
        """Waits until the device has done all it was given."""
        if self.device.type != "cpu":
            torch.cuda.synchronize(self.device)


def default_backend() -> Backend:
    """ "cuda" where its module loads and there is a GPU, else "cpu"."""
    if torch.cuda.device_count() > 0:
        try:
            Place("cuda", torch.device("cuda"), 1).native()
        except ImportError:
            return "cpu"
        return "cuda"
    return "cpu"
