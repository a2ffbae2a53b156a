"""How the ranks of a Buffer find each other: settings compared, windows handed over by file descriptor."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deep_a2a._cpu import Window
from deep_a2a.errors import CommError, CommTimeoutError, MismatchError
from deep_a2a.group import Group, all_gather


def host_identity() -> str:
    """The same for processes of one running kernel, different otherwise."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


@dataclass
class Member:
    """What one rank tells the others before there is a window."""

    host: str
    address: str
    token: str


def compare(settings: list[dict[str, Any]]) -> None:
    """Raise MismatchError, naming every setting in which a rank differs from rank 0."""
    differences = [
        f"{name} is {settings[0].get(name)!r} on rank 0 and {other.get(name)!r} on rank {rank}"
        for rank, other in enumerate(settings)
        for name in settings[0]
        if other.get(name) != settings[0].get(name)
    ]
    if differences:
        raise MismatchError("the ranks were given different settings: " + "; ".join(differences))


def ranks_per_host(hosts: list[str]) -> int:
    """Consecutive ranks that share a host; the same number on every host."""
    count = next((rank for rank, host in enumerate(hosts) if host != hosts[0]), len(hosts))
    for rank, host in enumerate(hosts):
        if host != hosts[rank - rank % count] or (rank % count == 0 and hosts.index(host) != rank):
            raise ValueError(
                f"ranks_per_node must be given: the group's ranks are not spread over hosts in equal runs (rank {rank})"
            )
    return count


class Listener:
    """A local socket that hands this rank's window to whoever knows the token: the peers, through the group."""

    def __init__(self, rank: int) -> None:
        self._token = secrets.token_hex(16)
        self._address = f"deep_a2a-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("\0" + self._address)  # abstract: no file, gone with the process
        self._socket.listen(4096)
        self._rank = rank

    @property
    def member(self) -> Member:
        return Member(host_identity(), self._address, self._token)

    def exchange(self, window: Window, members: list[Member], deadline: float) -> list[Window]:
        """Send the window to every peer, receive theirs: all windows by rank. TimeoutError after `deadline`."""
        windows: list[Window | None] = [None] * len(members)
        windows[self._rank] = window
        for rank, member in enumerate(members):
            if rank != self._rank:
                self._send(window, member, deadline)
        while any(peer is None for peer in windows):
            rank, fd = self._receive(deadline)
            try:
                windows[rank] = Window.map(fd=fd, nbytes=memoryview(window).nbytes)
            finally:
                os.close(fd)
        return [peer for peer in windows if peer is not None]

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _send(self, window: Window, member: Member, deadline: float) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(max(deadline - time.monotonic(), 0.01))
            connection.connect("\0" + member.address)
            socket.send_fds(connection, [f"{member.token}:{self._rank}".encode()], [window.fd])

    def _receive(self, deadline: float) -> tuple[int, int]:
        while True:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.01))
            connection, _ = self._socket.accept()
            with connection:
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                message, fds, _, _ = socket.recv_fds(connection, 256, 1)
            token, _, rank = message.decode(errors="replace").partition(":")
            if secrets.compare_digest(token, self._token) and len(fds) == 1:
                return int(rank), fds[0]
            for fd in fds:  # a stranger
                os.close(fd)


def meet(
    group: Group, settings: dict[str, Any], error: Exception | None, timeout_s: float
) -> tuple[Listener, list[Member]]:
    """Compare settings on every rank. A rank whose own are bad brings `error`, and all ranks raise."""
    listener = Listener(group.rank)
    try:
        mine = {"settings": None if error else settings, "error": brief(error), "member": vars(listener.member)}
        answers = all_gather(group, mine, timeout_s, "Buffer()")
        if error is not None:
            raise error
        for rank, answer in enumerate(answers):
            if answer["error"] is not None:
                raise CommError(f"rank {rank} could not make its Buffer: {answer['error']}")
        compare([answer["settings"] for answer in answers])
        return listener, [Member(**answer["member"]) for answer in answers]
    except BaseException:
        listener.__exit__()
        raise


def exchange_windows(
    group: Group, listener: Listener, members: list[Member], nbytes: int, timeout_s: float
) -> list[Window]:
    """Create this rank's window and map everybody else's. Fails on every rank if it fails on one."""
    elsewhere = [rank for rank, member in enumerate(members) if member.host != members[group.rank].host]
    if elsewhere:
        raise CommError(f"backend 'cpu' needs all ranks on one host, but ranks {elsewhere} are elsewhere")
    windows: list[Window] = []

    def create() -> None:
        windows.append(Window.create(nbytes=nbytes))

    def exchange() -> None:
        windows[:] = listener.exchange(windows[0], members, time.monotonic() + timeout_s)

    together(group, create, timeout_s, "create its window")
    together(group, exchange, timeout_s, "share its window")
    windows[group.rank].close_fd()
    return windows


def together(group: Group, step: Callable[[], None], timeout_s: float, purpose: str) -> None:
    """Run `step` on every rank; where one fails, all raise, that one its own error."""
    error: Exception | None = None
    try:
        step()
    except TimeoutError:
        error = CommTimeoutError(
            f"rank {group.rank} gave up after {timeout_s} s: it could not {purpose} with every rank"
        )
    except (OSError, RuntimeError) as failure:
        error = failure
    answers = all_gather(group, {"error": brief(error)}, timeout_s, f"a Buffer that wants to {purpose}")
    if error is not None:
        raise error
    for rank, answer in enumerate(answers):
        if answer["error"] is not None:
            raise CommError(f"rank {rank} could not {purpose}: {answer['error']}")


def brief(error: Exception | None) -> str | None:
    """An error's text, short enough to exchange."""
    return None if error is None else str(error)[:1000]
