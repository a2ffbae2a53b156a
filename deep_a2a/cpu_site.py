"""How ranks that are processes of one host share their windows: by file descriptor, over local sockets."""

from __future__ import annotations

import os
import secrets
import socket
import time

from deep_a2a._cpu import Window
from deep_a2a.arrays import Device
from deep_a2a.bootstrap import Member, host_identity, require_one_host, together
from deep_a2a.cpu_backend import CpuBackend
from deep_a2a.group import Group
from deep_a2a.memory import check_affordable
from deep_a2a.settings import Settings


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
        return {"host": host_identity(), "address": self._address, "token": self._token}

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

    def close(self) -> None:
        self._socket.close()

    def _send(self, window: Window, member: Member, deadline: float) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(max(deadline - time.monotonic(), 0.01))
            connection.connect("\0" + member["address"])
            socket.send_fds(connection, [f"{member['token']}:{self._rank}".encode()], [window.fd])

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


class CpuSite:
    """Where the ranks are processes of one host. See ``sites.Site``."""

    name = "cpu"
    device = Device("cpu")

    def __init__(self, rank: int, network_seed: int | None) -> None:
        self._listener = Listener(rank)
        self._network_seed = network_seed

    @property
    def member(self) -> Member:
        return self._listener.member

    def connect(
        self, group: Group, members: list[Member], settings: Settings, nbytes: int, timeout_s: float
    ) -> CpuBackend:
        require_one_host(members, group.rank, self.name)
        check_affordable(nbytes, len(members))
        windows: list[Window] = []

        def create() -> None:
            windows.append(Window.create(nbytes=nbytes))

        def exchange() -> None:
            windows[:] = self._listener.exchange(windows[0], members, time.monotonic() + timeout_s)

        together(group, create, timeout_s, "create its window")
        together(group, exchange, timeout_s, "share its window")
        windows[group.rank].close_fd()
        return CpuBackend(settings, group.rank, windows, timeout_s, self._network_seed)

    def close(self) -> None:
        self._listener.close()
