"""How long the calls of a Buffer keep the host: one rank, few tokens, so that the device is never behind.

python bench/host_time.py [--calls N] [--file FILE]

What the device does is measured elsewhere (`deep-a2a bench`); this is what the calling thread does before it may go on.
Allocations of torch and one of its kernels are timed beside it: hosts differ much, and how many of these a call takes
differs less.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import deep_a2a
from deep_a2a.benchmark.gpus import describe_gpus
from deep_a2a.benchmark.machine import describe_machine

_TOKENS, _HIDDEN, _EXPERTS, _TOPK = 16, 7168, 256, 8
_BATCH = 8  # calls between two waits for the device


@dataclass(frozen=True)
class Call:
    """`before` and `after` it nothing is timed; the latter gets what it returned."""

    name: str
    timed: Callable[[], Any]
    after: Callable[[Any], object] = lambda _: None
    before: Callable[[], object] = lambda: None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="How long the calls of a Buffer keep the host.")
    parser.add_argument("--backend", choices=["cuda", "emulated"], default="cuda", help="emulated: a test of this")
    parser.add_argument("--calls", type=int, default=400, metavar="N", help="of each kind (default: 400)")
    parser.add_argument("--file", type=Path, help="where to write what is printed")
    options = parser.parse_args(arguments)
    if options.calls < 1:
        parser.error(f"--calls is {options.calls}; expected 1 or more")
    lines = list(report(options.backend, options.calls, f"python bench/host_time.py {shlex.join(arguments)}".rstrip()))
    if options.file is not None:
        options.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def report(backend: str, num_calls: int, command: str) -> Iterator[str]:
    """Prints the lines and yields them."""

    def say(line: str) -> str:
        print(line, flush=True)
        return line

    device = torch.device("cuda", 0) if backend == "cuda" else torch.device("cpu")
    machine = describe_machine() | (describe_gpus(device) if backend == "cuda" else {})
    yield say("Microseconds that a call keeps the calling thread: median, and the ends of the middle eight tenths.")
    yield say(", ".join(f"{name} {value}" for name, value in machine.items()))
    yield say(f"{datetime.now(timezone.utc).isoformat(timespec='seconds')}  {command}")
    yield say(f"One rank, {_TOKENS} tokens of {_HIDDEN}, top-{_TOPK} of {_EXPERTS}.\n")
    for layout in ("rank", "expert"):
        for call in calls_of(backend, layout, device):
            yield say(f"{layout:6}  {call.name:26}  {timed(call, num_calls, device)}")
    words = torch.zeros(4, device=device)
    for call in (Call("empty", lambda: torch.empty(1024, device=device)), Call("add_", lambda: words.add_(1))):
        yield say(f"torch   {call.name:26}  {timed(call, num_calls, device)}")


def calls_of(backend: str, layout: Any, device: torch.device) -> Iterator[Call]:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    x = torch.randn(_TOKENS, _HIDDEN, device=device).bfloat16()
    topk_weights, topk_idx = torch.rand(_TOKENS, _EXPERTS, device=device).topk(_TOPK)
    with deep_a2a.Buffer(
        dist.group.WORLD,
        hidden=_HIDDEN,
        num_experts=_EXPERTS,
        num_topk=_TOPK,
        num_max_tokens_per_rank=_TOKENS,
        layout=layout,
        backend=backend,  # type: ignore[arg-type]
        timeout_s=60,
    ) as buffer:
        dispatch = partial(buffer.dispatch, x, topk_idx, topk_weights)
        unsynced = partial(dispatch, host_sync=False)
        release = deep_a2a.DispatchResult.release
        first = unsynced()
        rows, handle = torch.zeros_like(first.x), first.handle
        first.release()
        results: list[deep_a2a.DispatchResult] = []
        yield Call("dispatch, host_sync=False", unsynced, release)
        yield Call("the same, quantize='fp8'", partial(unsynced, quantize="fp8"), release)
        yield Call("the same, async_op=True", partial(unsynced, async_op=True), release)
        yield Call("dispatch, waits for counts", dispatch, release)
        yield Call("dispatch, cached", partial(buffer.dispatch, x, handle=handle), release)
        yield Call("release", lambda: results.pop().release(), before=lambda: results.append(unsynced()))
        yield Call("combine", partial(buffer.combine, rows, handle))


def timed(call: Call, num_calls: int, device: torch.device) -> str:
    samples = []
    for i in range(-_BATCH, num_calls):
        call.before()
        start = time.perf_counter_ns()
        result = call.timed()
        samples.append((time.perf_counter_ns() - start) / 1e3)
        call.after(result)
        del result
        if i % _BATCH == _BATCH - 1 and device.type == "cuda":
            torch.cuda.synchronize(device)
    samples = sorted(samples[_BATCH:])
    tenth = len(samples) // 10
    return f"{statistics.median(samples):7.1f}  ({samples[tenth]:.1f} to {samples[-1 - tenth]:.1f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
