"""Pools of rank processes: forked from a server that has torch loaded, used by many tests, replaced after a failure.

A rank is a process with a gloo process group over the loopback and one torch thread. `Pool.run` calls one top-level
function on all ranks at once. Nothing here waits without a deadline, and ranks end with the test process, however it
ends.
"""

from __future__ import annotations

import datetime
import faulthandler
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import loopback
import torch
import torch.distributed as dist

START_DEADLINE_S = 60.0
RUN_DEADLINE_S = 60.0
GRACE_S = 2.0  # what the other ranks get to finish, or to fail too, once one has failed

# Loaded once, by the server; a fork then costs milliseconds. deep_a2a is not in it, so that importing it stays a
# matter of the tests.
PRELOADED = ["torch", "torch.distributed", "numpy", "pytest", "hypothesis"]

# Errors that a rank gets because another one failed: shown after those that can be the cause.
CONSEQUENCES = {"CommTimeoutError": 1, "DistBackendError": 1, "DistNetworkError": 1, "PeerAbortError": 2}


class RankError(Exception):
    """Some ranks failed; the message holds their tracebacks, the likely cause first."""


@dataclass(frozen=True)
class Answer:
    """What a rank sends back: `value` if the call returned, else the type and the text of what it raised."""

    value: Any = None
    error: str | None = None
    text: str = ""
    time_s: float = 0.0


def tensor_from_bytes(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


class TensorPickler(pickle.Pickler):
    """Sends tensors as plain bytes: torch's own pickling of small tensors costs more than these tests do."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        data = bytearray(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return tensor_from_bytes, (data, value.dtype, tuple(value.shape))


def dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    TensorPickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def exit_with_parent(alive: Connection, directory: str) -> None:
    """Body of a thread: the other end of `alive` is closed when the test process is gone."""
    wait([alive])
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


def serve(
    jobs: Connection, alive: Connection, rank: int, num_ranks: int, directory: str, environment: dict[str, str]
) -> None:
    """Body of a rank: joins the process group, then does what `jobs` brings until it brings nothing."""
    os.environ.update(environment)
    watcher = threading.Thread(target=exit_with_parent, args=(alive, directory), daemon=True)
    watcher.start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test process ends its ranks
    stacks = (Path(directory) / f"stacks.{rank}").open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    method = f"file://{directory}/store"
    timeout = datetime.timedelta(seconds=START_DEADLINE_S)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        jobs.send_bytes(dumps(Answer()))
        while (data := jobs.recv_bytes()) != b"":
            jobs.send_bytes(answer(data))
    except (EOFError, OSError):
        watcher.join()
    os._exit(0)  # nothing of the group's teardown is under test, and it may wait for others


def answer(data: bytes) -> bytes:
    """Makes one call on this rank. What pytest raises to end a test is no Exception, hence BaseException."""
    try:
        function, args = pickle.loads(data)
        return dumps(Answer(value=function(dist.group.WORLD, *args)))
    except BaseException as error:
        return dumps(Answer(None, type(error).__name__, traceback.format_exc(), time.monotonic()))


class Pool:
    """`num_ranks` rank processes, started at the first `run` and again at the first `run` after a failure."""

    def __init__(self, num_ranks: int, environment: dict[str, str] | None = None) -> None:
        self.num_ranks = num_ranks
        self._environment = environment or {}
        self._processes: list[BaseProcess] = []
        self._jobs: list[Connection] = []
        self._alive: list[Connection] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        deadline_s: float = RUN_DEADLINE_S,
        killed: Collection[int] = (),
    ) -> list[Any]:
        """Returns what `function(group, *args)` returned, by rank; raises RankError if it raised on any.

        `function` is a top-level function. `killed` are the ranks that have to die in the call: theirs is None, and
        the pool starts afresh at the next call.
        """
        __tracebackhide__ = True
        if not self._processes:
            self._start()
        data = dumps((function, args))
        try:
            for jobs in self._jobs:
                jobs.send_bytes(data)
            answers = self._collect(deadline_s, killed)
        except BaseException:
            self.kill()
            raise
        if killed:
            self.kill()
        return [answers[rank].value if rank in answers else None for rank in range(self.num_ranks)]

    def close(self) -> None:
        """Ends the ranks, in peace if they can."""
        for jobs in self._jobs:
            try:
                jobs.send_bytes(b"")
            except OSError:
                break
        end = time.monotonic() + GRACE_S
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(START_DEADLINE_S)
        for connection in self._jobs + self._alive:
            connection.close()
        if self._directory is not None:
            self._directory.cleanup()
        self._processes, self._jobs, self._alive, self._directory = [], [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._directory = tempfile.TemporaryDirectory(prefix="ranks.")
        with loopback.for_children():
            self._start_ranks(context, self._directory.name)

    def _start_ranks(self, context: Any, directory: str) -> None:
        try:
            for rank in range(self.num_ranks):
                jobs, rank_jobs = context.Pipe()
                rank_alive, alive = context.Pipe(duplex=False)
                args = (rank_jobs, rank_alive, rank, self.num_ranks, directory, self._environment_of(rank))
                process = context.Process(target=serve, args=args, name=f"rank{rank}", daemon=True)
                self._jobs.append(jobs)
                self._alive.append(alive)
                process.start()
                self._processes.append(process)
                rank_jobs.close()
                rank_alive.close()
            self._collect(START_DEADLINE_S, ())
        except BaseException:
            self.kill()
            raise

    def _environment_of(self, rank: int) -> dict[str, str]:
        # The emulator's schedules differ between ranks.
        return {"DEEP_A2A_EMULATOR_SEED": str(rank), **loopback.of_rank(rank), **self._environment}

    def _collect(self, deadline_s: float, killed: Collection[int]) -> dict[int, Answer]:
        """One answer of every rank that is not `killed`; raises RankError with all that went wrong."""
        end = time.monotonic() + deadline_s
        answers: dict[int, Answer] = {}
        failed: dict[int, Answer] = {}
        waiting = set(range(self.num_ranks))
        while waiting and (left := end - time.monotonic()) > 0:
            ready = wait([self._jobs[rank] for rank in waiting], left)
            for rank in [rank for rank in waiting if self._jobs[rank] in ready]:
                answer = self._receive(rank, killed)
                (failed if answer.error is not None else answers)[rank] = answer
                waiting.remove(rank)
                if answer.error is not None:
                    end = min(end, time.monotonic() + GRACE_S)
        if failed or waiting:
            raise RankError(self._describe(failed, waiting, deadline_s))
        return answers

    def _receive(self, rank: int, killed: Collection[int]) -> Answer:
        try:
            answer: Answer = pickle.loads(self._jobs[rank].recv_bytes())
        except (EOFError, OSError):
            process = self._processes[rank]
            process.join(GRACE_S)
            if rank in killed:
                return Answer()
            text = f"the process ended with exit code {process.exitcode}\n{self._stacks(rank)}"
            return Answer(None, "ended", text, time.monotonic())
        if rank in killed and answer.error is None:
            return Answer(None, "alive", "the rank was to be killed, but its call returned\n", time.monotonic())
        return answer

    def _describe(self, failed: dict[int, Answer], waiting: set[int], deadline_s: float) -> str:
        def likeliest(item: tuple[int, Answer]) -> tuple[int, float]:
            return CONSEQUENCES.get(item[1].error or "", 0), item[1].time_s

        parts = [f"---- rank {rank} ----\n{a.text}" for rank, a in sorted(failed.items(), key=likeliest)]
        if waiting and failed:
            parts.append(f"---- ranks {sorted(waiting)} had not finished {GRACE_S} s after that and were killed ----")
        elif waiting:
            parts.append(f"---- ranks {sorted(waiting)} did not finish within {deadline_s} s; where they are: ----")
            for rank in sorted(waiting):
                os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
            time.sleep(0.2)
            parts += [f"---- rank {rank} ----\n{self._stacks(rank)}" for rank in sorted(waiting)]
        return f"{len(failed) + len(waiting)} of {self.num_ranks} ranks failed\n" + "\n".join(parts)

    def _stacks(self, rank: int) -> str:
        assert self._directory is not None
        path = Path(self._directory.name) / f"stacks.{rank}"
        return path.read_text() if path.exists() else ""
