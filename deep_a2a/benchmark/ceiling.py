"""What the link of the cpu backend carries: all ranks store into a neighbour's window at once, as fast as libc can.

A window is anonymous shared memory, as in the backend. The neighbours reach it through /proc, so that ranks need no
common ancestor (torchrun). The source is small enough to stay in the cache: a dispatched row is read once and stored
several times, so a copy from memory to memory would be less than the link carries.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
import torch.distributed as dist

_PIECE_BYTES = 1 << 20


class CopyCeiling:
    """Bytes a second that each rank can store in a peer's window while all ranks do the same. Collective."""

    def __init__(self, group: dist.ProcessGroup, num_bytes: int) -> None:
        """num_bytes: what each rank copies, at least; use about as much as the measured operation moves."""
        self._num_pieces = max(-(-num_bytes // _PIECE_BYTES), 1)
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        fd = os.memfd_create("deep_a2a_ceiling")
        os.ftruncate(fd, self._num_pieces * _PIECE_BYTES)
        names: list[str] = [""] * num_ranks
        dist.all_gather_object(names, f"/proc/{os.getpid()}/fd/{fd}", group=group)
        peer_fd = os.open(names[(rank + 1) % num_ranks], os.O_RDWR)
        self.window = mmap.mmap(peer_fd, self._num_pieces * _PIECE_BYTES)
        os.close(peer_fd)
        dist.barrier(group=group)  # before this descriptor goes, the neighbour must have opened its own
        os.close(fd)
        self.piece = torch.randint(256, (_PIECE_BYTES,), dtype=torch.uint8)
        self.copy()  # touches all pages

    def copy(self) -> None:
        """One round: fills the next rank's window."""
        target, source = ctypes.addressof(ctypes.c_char.from_buffer(self.window)), self.piece.data_ptr()
        for piece in range(self._num_pieces):
            ctypes.memmove(target + piece * _PIECE_BYTES, source, _PIECE_BYTES)

    def gbs(self, microseconds: float) -> float:
        """1e9 bytes a second per rank, for a round that took this long."""
        return self._num_pieces * _PIECE_BYTES / microseconds / 1e3
