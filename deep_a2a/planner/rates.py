"""The rates that times are made of. Each one has the place where it was measured or published."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Rate:
    """A constant of the model. `name` is its entry in the links of bench/results/published.json."""

    name: str
    value: float
    unit: str
    source: str


_LINKS = "measured on 4 x H200 for this project"
RATES: dict[str, Rate] = {
    rate.name: rate
    for rate in (
        Rate("sm_out", 50.0, "GB/s", f"{_LINKS}: what an SM stores, to any GPU"),
        Rate("sm_in", 79.0, "GB/s", f"{_LINKS}: what an SM loads, from any GPU"),
        Rate("nvlink_push", 335.0, "GB/s", f"{_LINKS}: bulk stores to all peers at once, 8 SMs or more"),
        Rate("nvlink_pull", 322.0, "GB/s", f"{_LINKS}: bulk loads from all peers at once, 8 SMs or more"),
        Rate("flag", 1.2, "us", f"{_LINKS}: a flag's way to a peer over NVLink"),
        Rate("network_put", 47.0, "GB/s", "deepseek-ai/DeepEP issue 155: NVSHMEM puts between H100 nodes, a NIC each"),
        Rate("network_line", 50.0, "GB/s", "400 Gb/s, the line rate of a ConnectX-7"),
        Rate("network_signal", 8.35, "us", "arXiv 2511.15076: half of a round trip of 16.7 us, put with signal, H100"),
        Rate("h200_memory", 4800.0, "GB/s", "NVIDIA, data sheet of the H200"),
        Rate("h100_memory", 3350.0, "GB/s", "NVIDIA, data sheet of the H100 SXM"),
        Rate("h800_nvlink", 160.0, "GB/s", "deepseek-ai/DeepEP, docs/legacy.md: NVLink of an H800, at most"),
    )
}


def _default(name: str) -> float:
    return RATES[name].value


@dataclass(frozen=True)
class Hardware:
    """Rates per GPU (or per SM), in 1e9 bytes a second and direction; times of a flag in microseconds.

    The defaults are an H200 (NVLink 4, 18 links) with a 400 Gb/s NIC of its own; `RATES` has the sources.
    """

    sm_out_gbs: float = _default("sm_out")
    sm_in_gbs: float = _default("sm_in")
    nvlink_push_gbs: float = _default("nvlink_push")
    nvlink_pull_gbs: float = _default("nvlink_pull")
    network_gbs: float = _default("network_put")
    memory_gbs: float = _default("h200_memory")
    flag_us: float = _default("flag")
    network_signal_us: float = _default("network_signal")

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{field.name} is {value!r} of type {type(value).__name__}, expected a number")
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{field.name} is {value}, expected a positive number")


H200 = Hardware()
H100 = Hardware(memory_gbs=_default("h100_memory"))
H800 = Hardware(
    nvlink_push_gbs=_default("h800_nvlink"),
    nvlink_pull_gbs=_default("h800_nvlink"),
    memory_gbs=_default("h100_memory"),
)
