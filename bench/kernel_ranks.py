"""Several ranks in one process, each on a GPU of its choice: streams, gate and clocks.

Kernels of one process run side by side on a GPU, those of several processes take turns. So ranks that share a GPU
divide its SMs here, each with a part of its own, and a rank that has one to itself sees what it would see if all had.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from cuda_driver import call, ordinal_of
from sm_partitions import PartitionStream, partition_streams

from deep_a2a.benchmark.link import Direction, Link, LinkSpeed, meter_bytes, whole_pieces
from deep_a2a.benchmark.place import Place
from deep_a2a.benchmark.record import Backend
from deep_a2a.benchmark.stream_gate import GpuStopwatch

if TYPE_CHECKING:
    from deep_a2a._cuda import Meter, Stream, Window

OfRank = Callable[[int], object]

_NUM_WARMUP = 2
_TIMEOUT_S = {"cuda": 20.0, "emulated": 120.0}
_LINK_BYTES_PER_PEER = {"cuda": 16 << 20, "emulated": 14336}
_LINK_SMS = {"cuda": (8, 16, 32), "emulated": (1, 2)}
_FLUSH_BYTES = 256 << 20  # several times a second-level cache
_PEER_ACCESS_ALREADY_ENABLED = 704


def prepare_environment() -> None:
    """What kernels that wait for each other need of CUDA in one process; to be called before anything asks for a GPU.

    A module that is loaded late may wait for all kernels, and streams that share a queue wait for each other.
    """
    os.environ["CUDA_MODULE_LOADING"] = "EAGER"
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"


def enable_peer_access(devices: Sequence[int]) -> None:
    """Lets kernels on each of `devices` reach the memory of the others. RuntimeError where the driver refuses."""
    contexts = {}
    for device in devices:
        torch.cuda.synchronize(device)  # initialises CUDA
        contexts[device] = ctypes.c_void_p()
        context = ctypes.byref(contexts[device])
        call("cuDevicePrimaryCtxRetain", context, ordinal_of(device), of=f"device {device}")
    for device, peer in itertools.permutations(devices, 2):
        call("cuCtxSetCurrent", contexts[device])
        pair = f"device {device} to device {peer}"
        call("cuCtxEnablePeerAccess", contexts[peer], 0, accept=[_PEER_ACCESS_ALREADY_ENABLED], of=pair)


class EmulatorWatch:
    """The host's clock on a stream of the emulator, in the place of a GpuStopwatch."""

    def __init__(self, stream: Stream | PartitionStream) -> None:
        self._stream, self._start_ns = stream, 0

    def start(self) -> None:
        self._start_ns = time.perf_counter_ns()

    def stop(self) -> None:
        """The operation ends when the stream has nothing left to do."""

    def microseconds(self) -> float:
        self._stream.synchronize()
        return (time.perf_counter_ns() - self._start_ns) * 1e-3


class Ranks:
    """A stream and a meter for each of `devices`, a clock for rank 0. ValueError for a device that is not there.

    With `flush`, on GPUs alone, each of them writes _FLUSH_BYTES before each iteration: kernels find neither their
    instructions nor their data in its caches, as among the layers of a model.
    """

    def __init__(self, backend: Backend, devices: Sequence[int], flush: bool = False) -> None:
        self.backend, self.devices = backend, tuple(devices)
        self.native: Any = Place(backend, torch.device("cpu"), None).native()
        self.timeout_s = _TIMEOUT_S[backend]
        count = self.native.device_count()
        if len(devices) < 2 or not all(0 <= device < count for device in devices):
            raise ValueError(
                f"devices is {','.join(map(str, devices))}; expected two or more, one for each rank, each less than "
                f"{count}, the number of devices"
            )
        on_gpus = backend == "cuda"
        if on_gpus:
            enable_peer_access(sorted(set(devices)))
        self.places = [torch.device("cuda", device) if on_gpus else torch.device("cpu") for device in devices]
        flushed = sorted(set(devices)) if flush else []
        self._flushed = [torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=f"cuda:{device}") for device in flushed]
        self.streams = self._make_streams()
        windows = self.windows(meter_bytes(len(devices), _LINK_BYTES_PER_PEER[backend]))
        self._meters: list[Meter] = [
            self.native.Meter(rank=rank, device=device, windows=windows, timeout_s=self.timeout_s)
            for rank, device in enumerate(devices)
        ]
        self._watch = GpuStopwatch(self.places[0]) if on_gpus else EmulatorWatch(self.streams[0])

    def _make_streams(self) -> list[Stream | PartitionStream]:
        """Of a rank that shares a GPU: on an own part of its SMs."""
        parts = {
            device: iter(partition_streams(device, count))
            for device, count in Counter(self.devices).items()
            if count > 1 and self.backend == "cuda"
        }
        return [next(parts[device]) if device in parts else self.native.Stream(device) for device in self.devices]

    def windows(self, nbytes: int) -> list[Window]:
        """One for each rank; in one process an address is good on all GPUs."""
        return [self.native.Window.create(nbytes, device) for device in self.devices]

    def together(self, operation: OfRank) -> None:
        """Runs `operation` on all ranks without the gate, and waits until it is done."""
        for rank in range(len(self.devices)):
            with self._current(rank):
                operation(rank)
        self._synchronize()

    def measure(self, operation: OfRank, num_iters: int, after: OfRank = lambda rank: None) -> float:
        """Median microseconds that `operation` takes on rank 0, from the common release of all streams.

        Only rank 0 is timed: events on streams that share a GPU would let their kernels begin up to 6 us after each
        other, and rank 0 would wait for them. `after` follows the operation and is not timed.
        """
        self.together(operation)  # once while nothing is held: what still has to be loaded may wait for all kernels
        self.together(after)
        samples = [self._sample(operation, after) for _ in range(_NUM_WARMUP + num_iters)][_NUM_WARMUP:]
        return statistics.median(samples)

    def measure_link(self, most_sms: int, num_iters: int) -> Link:
        """What rank 0's link carries: bulk copies from every rank to every other, on up to `most_sms` SMs of each."""
        nbytes, speeds = whole_pieces(_LINK_BYTES_PER_PEER[self.backend]), []
        for num_sms, direction in itertools.product(_LINK_SMS[self.backend], get_args(Direction)):
            if num_sms > most_sms:
                continue
            copy = partial(
                self._copy, direction=getattr(self.native.Direction, direction), nbytes=nbytes, num_sms=num_sms
            )
            microseconds = self.measure(copy, num_iters)
            speeds.append(
                LinkSpeed(direction, num_sms, round(nbytes * (len(self.devices) - 1) / microseconds / 1e3, 3))
            )
        return Link(speeds, ", of rank 0")

    def synchronize_devices(self) -> None:
        """Waits for all streams, torch's own among them."""
        for place in set(self.places):
            if place.type == "cuda":
                torch.cuda.synchronize(place)
        self._synchronize()

    def _copy(self, rank: int, **how: Any) -> None:
        self._meters[rank].copy_all_to_all(stream=self.streams[rank].handle, **how)

    def _sample(self, operation: OfRank, after: OfRank) -> float:
        for memory in self._flushed:
            memory.zero_()
        if self._flushed:
            self.synchronize_devices()
        try:
            for rank, meter in enumerate(self._meters):
                with self._current(rank):
                    meter.hold(self.streams[rank].handle)
                    if rank == 0:
                        self._watch.start()
                    operation(rank)
                    if rank == 0:
                        self._watch.stop()
                    after(rank)
        finally:
            for meter in self._meters:
                meter.open()
        microseconds = self._watch.microseconds()
        self._synchronize()
        if any(meter.late() for meter in self._meters):
            raise TimeoutError("the gate gave up: some rank's stream did not come in time")
        return microseconds

    def _synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()

    @contextmanager
    def _current(self, rank: int) -> Iterator[None]:
        """The rank's device and stream as torch's current ones."""
        if self.backend != "cuda":
            yield
            return
        cuda: Any = torch.cuda  # whose streams are untyped in some versions
        with cuda.stream(cuda.ExternalStream(self.streams[rank].handle, device=self.places[rank])):
            yield
