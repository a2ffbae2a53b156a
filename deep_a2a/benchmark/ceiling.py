"""What the link of the cpu backend carries: all ranks copy from their own window into a neighbour's at once.

A window is anonymous shared memory, as in the backend. The neighbours reach it through /proc, so that ranks need no
common ancestor (torchrun). The copy is libc's memmove of whole rows' worth of memory, all pages touched before.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
import torch.distributed as dist

_PIECE_BYTES = 64 * 1024  # as an engine would copy: pieces of a few rows, not one call over everything


class CopyCeiling:
    """Bytes a second that each rank can copy to a peer while all ranks do the same. Collective."""

    def __init__(self, group: dist.ProcessGroup, num_bytes: int) -> None:
        """num_bytes: what each rank copies, at least; use about as much as the measured operation moves."""
        pieces = max(num_bytes // _PIECE_BYTES, 16)
        self.num_bytes = pieces * _PIECE_BYTES
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        fd = os.memfd_create("deep_a2a_ceiling")
        os.ftruncate(fd, 2 * self.num_bytes)
        names: list[str] = [""] * num_ranks
        dist.all_gather_object(names, f"/proc/{os.getpid()}/fd/{fd}", group=group)
        self._own = mmap.mmap(fd, 2 * self.num_bytes)
        peer_fd = os.open(names[(rank + 1) % num_ranks], os.O_RDWR)
        self._peer = mmap.mmap(peer_fd, 2 * self.num_bytes)
        os.close(peer_fd)
        torch.frombuffer(self._own, dtype=torch.uint8).random_(0, 256)
        dist.barrier(group=group)
        os.close(fd)
        self._source, self._target = _address(self._own), _address(self._peer) + self.num_bytes
        self.copy()

    def copy(self) -> None:
        """One round: the lower half of the own window to the upper half of the next rank's."""
        for offset in range(0, self.num_bytes, _PIECE_BYTES):
            ctypes.memmove(self._target + offset, self._source + offset, _PIECE_BYTES)

    def gbs(self, microseconds: float) -> float:
        """1e9 bytes a second per rank, for a round that took this long."""
        return self.num_bytes / microseconds / 1e3


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
