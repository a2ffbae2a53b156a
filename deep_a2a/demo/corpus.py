"""Real text that every machine has: the sources of Python's own standard library."""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
_VALIDATION_SHARE = 16
_FILE_END = b"\0"


@dataclass(frozen=True)
class Corpus:
    """train, validation: uint8 [bytes]. Whole files belong to one or the other."""

    train: Tensor
    validation: Tensor

    def batch(self, step: int, *, num_sequences: int, length: int, seed: int) -> Tensor:
        """The batch of a training step, of all ranks together and equal on all: int64 [num_sequences, length + 1]."""
        generator = torch.Generator().manual_seed((seed << 32) + step)
        starts = torch.randint(len(self.train) - length, (num_sequences,), generator=generator)
        return _sequences(self.train, starts, length)

    def validation_batch(self, index: int, *, num_sequences: int, length: int) -> Tensor:
        """Batch `index` of a fixed walk through the held-out files: int64 [num_sequences, length + 1]."""
        first = index * num_sequences
        starts = (torch.arange(first, first + num_sequences) * 7919 * length) % (len(self.validation) - length)
        return _sequences(self.validation, starts, length)


def load_corpus(max_bytes: int, root: Path | None = None) -> Corpus:
    """The files below `root` (the standard library), in a fixed order, to about `max_bytes` bytes.

    A file is held out if the checksum of its name says so: the split does not change when other files come or go.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    taken = 0
    for name in _source_files(folder):
        if taken >= max_bytes:
            break
        text = (folder / name).read_bytes()
        held_out = zlib.crc32(name.encode()) % _VALIDATION_SHARE == 0
        parts[held_out].append(text + _FILE_END)
        taken += len(text)
    if not parts[False] or not parts[True]:
        raise FileNotFoundError(f"{folder}: too few *.py files to train on and to validate with")
    return Corpus(train=_as_tensor(parts[False]), validation=_as_tensor(parts[True]))


def _source_files(folder: Path) -> Iterator[str]:
    """Names relative to `folder`, with slashes, each folder's files before its folders, both in order."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for file in sorted(files):
            if file.endswith(".py"):
                yield (Path(parent) / file).relative_to(folder).as_posix()


def _as_tensor(parts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def _sequences(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts.unsqueeze(1) + torch.arange(length + 1)].long()
