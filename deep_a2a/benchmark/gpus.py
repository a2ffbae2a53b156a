"""What a result file says about the GPUs that it was taken on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deep_a2a.benchmark.machine import driver_version


def describe_gpus(device: torch.device) -> dict[str, Any]:
    """The GPUs of this host, as `device` is one, and the versions of what drives them; nothing where it is none."""
    if device.type == "cpu":
        return {}
    nccl: Callable[[], tuple[int, ...]] = torch.cuda.nccl.version
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_sms": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl())),
    }
