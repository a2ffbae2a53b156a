"""Process groups of ``torch.distributed``."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from deep_a2a.group import MESSAGE_BYTES


class TorchGroup:
    """A ``torch.distributed`` process group of any backend (None: the default group)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "group is a torch process group, but torch.distributed is not initialized: "
                "call torch.distributed.init_process_group first"
            )
        self.group = group if group is not None else dist.group.WORLD
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group does not contain this rank")

    def all_gather_bytes(self, message: bytes, timeout_s: float) -> list[bytes]:
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        padded = message.ljust(MESSAGE_BYTES, b"\0")
        mine = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            work = dist.all_gather(gathered, mine, group=self.group, async_op=True)
            assert work is not None
            finished = work.wait(timeout=timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise TimeoutError(str(error)) from error
        if not finished:
            raise TimeoutError(f"no answer from all ranks within {timeout_s} s")
        return [bytes(row.cpu().numpy().tobytes()).rstrip(b"\0") for row in gathered]
