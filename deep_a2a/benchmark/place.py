"""Where the tensors of a rank lie: the host's memory, or a GPU. Ranks take the host's GPUs in turn."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from deep_a2a.benchmark.record import Backend, StreamName

_NATIVE = {"cuda": "deep_a2a._cuda", "emulated": "deep_a2a._emulated"}


@dataclass(frozen=True)
class Place:
    """Of one rank. `num_gpus` is how many GPUs all ranks of the run use together; None where they use none."""

    backend: Backend
    device: torch.device
    num_gpus: int | None

    @staticmethod
    def of(backend: Backend, rank: int, num_ranks: int) -> Place:
        """Raises RuntimeError where the backend is "cuda" and torch sees no GPU."""
        if backend != "cuda":
            return Place(backend, torch.device("cpu"), None)
        count = torch.cuda.device_count()
        if count == 0:
            raise RuntimeError("backend is cuda, but torch.cuda.device_count() is 0; expected a GPU")
        return Place(backend, torch.device("cuda", rank % count), min(count, num_ranks))

    @property
    def device_idx(self) -> int:
        return self.device.index or 0

    def buffer_options(self, stream: StreamName) -> dict[str, Any]:
        """What a Buffer has to be told besides its shape."""
        if self.backend == "cpu":
            return {}
        return {"stream": stream, **({"device": self.device_idx} if self.backend == "cuda" else {})}

    def native(self) -> ModuleType:
        """The backend's native module; ImportError where it was not built."""
        importlib.import_module("deep_a2a._cpu")  # has the types of the others' arguments
        return importlib.import_module(_NATIVE[self.backend])

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
