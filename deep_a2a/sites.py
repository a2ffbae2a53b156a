"""Which backend a Buffer takes, and what that needs before the ranks have met."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Literal, Protocol

from deep_a2a.arrays import Device
from deep_a2a.backend import Backend
from deep_a2a.bootstrap import Member
from deep_a2a.cpu_site import CpuSite
from deep_a2a.cuda_site import CudaSite
from deep_a2a.group import Group
from deep_a2a.settings import Settings
from deep_a2a.streams import StreamChoice

BackendName = Literal["auto", "cpu", "cuda", "emulated"]
StreamName = Literal["own", "current"]

MODULES = {"cuda": "deep_a2a._cuda", "emulated": "deep_a2a._emulated"}


class Site(Protocol):
    """One rank on its way to a backend."""

    name: str
    device: Device

    @property
    def member(self) -> Member:
        """What the other ranks have to know."""

    def connect(
        self, group: Group, members: list[Member], settings: Settings, nbytes: int, timeout_s: float
    ) -> Backend:
        """With all ranks: windows of `nbytes`, and the backend over them. Fails on every rank if it fails on one."""

    def close(self) -> None: ...


def resolve(backend: BackendName, device: int | None) -> str:
    """What "auto" means here: "cuda" where there is a GPU that the caller's arrays can be on, else "cpu"."""
    if backend != "auto":
        return backend
    try:
        native = import_module(MODULES["cuda"])
    except ImportError:
        return "cpu"
    torch = sys.modules.get("torch")
    usable = device is not None or torch is None or torch.cuda.is_available() or "cupy" in sys.modules
    return "cuda" if usable and native.device_count() > 0 else "cpu"


def choose_site(
    name: str,
    rank: int,
    *,
    device: int | None,
    num_sms: int | None,
    stream: StreamName,
    network_seed: int | None,
) -> Site:
    """Raises ValueError where this rank cannot have the backend `name`."""
    if name == "cpu":
        return CpuSite(rank, network_seed)
    try:
        native: Any = import_module(MODULES[name])
    except ImportError as error:
        raise ValueError(
            f"backend is {name!r}, but its native module does not load here ({error}): 'deep-a2a info' says what is "
            'missing; backend="cpu" runs the same protocol'
        ) from error
    ordinal = _ordinal(native, name, device)
    where = Device("cpu") if name == "emulated" else Device("cuda", ordinal)
    return CudaSite(
        native,
        name,
        where,
        ordinal,
        num_sms=num_sms or 0,
        choice=StreamChoice(stream),
        delay_seed=network_seed,
    )


def _ordinal(native: Any, name: str, device: int | None) -> int:
    count = native.device_count()
    if count == 0:
        raise ValueError(f"backend is {name!r}, but no GPU is to be seen: check nvidia-smi and CUDA_VISIBLE_DEVICES")
    ordinal = _current_device() if device is None and name == "cuda" else device or 0
    if not 0 <= ordinal < count:
        raise ValueError(f"device must be None or one of the {count} that this process sees, got {ordinal}")
    return ordinal


def _current_device() -> int:
    """Of this thread, as the array library in use has it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.current_device())
    cupy = sys.modules.get("cupy")
    return 0 if cupy is None else int(cupy.cuda.runtime.getDevice())
