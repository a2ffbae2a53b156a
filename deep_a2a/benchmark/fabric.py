"""What connects the ranks, taken as nodes of one size: a gate for all of them, and what the links carry.

Within one node the gate is in windows that all reach; across nodes its signals go over the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from deep_a2a.benchmark.link import Link, make_meter, measure_link
from deep_a2a.benchmark.network import Network, Puts, measure_network
from deep_a2a.benchmark.place import Place
from deep_a2a.benchmark.record import WireBytes
from deep_a2a.benchmark.stream_gate import StreamGate
from deep_a2a.benchmark.wire_bytes import link_time_ratio

# What the emulator is asked for is small, since it takes a second for what a GPU does in a microsecond.
_LINK_BYTES_PER_PEER = {"cuda": 48 << 20, "emulated": 14336}
_LINK_SMS = {"cuda": (4, 8, 16, 24, 32), "emulated": (1, 2)}


class Fabric:
    """On one rank with a GPU, or an emulated one. Collective, as are its methods and the gate."""

    def __init__(self, group: dist.ProcessGroup, place: Place, ranks_per_node: int, timeout_s: float) -> None:
        self.ranks_per_node = ranks_per_node
        self.num_nodes = dist.get_world_size(group) // ranks_per_node
        self.link: Link | None = None
        self.network: Network | None = None
        self._group, self._place, self._timeout_s = group, place, timeout_s
        self._puts: Puts | None = None
        self.gate = self._make_gate()

    def measure(self, num_sms: Iterable[int]) -> None:
        """What the links of a node carry, and the network: that on `num_sms` too."""
        num_bytes, num_peers = _LINK_BYTES_PER_PEER[self._place.backend], self.ranks_per_node - 1
        meter: Any = self.gate.meter
        if self.num_nodes > 1 and num_peers > 0:
            meter = make_meter(self._group, self._place, num_bytes, self._timeout_s, self.ranks_per_node)
        sms = _LINK_SMS[self._place.backend]
        self.link = measure_link(self.gate, meter, num_peers, self._place, num_bytes, sms)
        if self._puts is not None:
            self.network = measure_network(self.gate, self._puts, self._place, num_sms)
        dist.barrier(group=self._group)  # nobody frees memory that another rank may still be looking at

    def renew_gate(self) -> StreamGate:
        """A gate that has not given up."""
        if self._puts is not None:
            self._puts.retire()
        self.gate = self._make_gate()
        return self.gate

    def _make_gate(self) -> StreamGate:
        if self.num_nodes > 1:
            self._puts = Puts(self._group, self._place, self.ranks_per_node, self._timeout_s)
            return StreamGate(self._group, self._place, self._puts.meter)
        num_bytes = _LINK_BYTES_PER_PEER[self._place.backend]
        return StreamGate(self._group, self._place, make_meter(self._group, self._place, num_bytes, self._timeout_s))

    def fields(self, total_us: float, wire: WireBytes, num_sms: int | None) -> dict[str, float | str | None]:
        """What a record says of the links: their ceilings, and the total over the times that they need at these."""
        link, network = self.link, self.network
        link_gbs = None if link is None else link.ceiling.gbs
        network_gbs = None if network is None else network.ceiling.gbs
        network_us = wire.link_us(None, network_gbs).get("network")
        return {
            "ceiling_gbs": link_gbs,
            "ceiling_of": None if link is None else link.describe(),
            "link_time_ratio": link_time_ratio(total_us, wire, link_gbs, network_gbs),
            "network_ceiling_gbs": network_gbs,
            "network_ceiling_of": None if network is None else network.describe(),
            "network_ceiling_at_sms_gbs": None if network is None else network.gbs_at(num_sms),
            "network_ratio": None if network_us is None else round(total_us / network_us, 3),
        }

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """All speeds, as a result file has them of the machine."""
        split = {"ranks_per_node": self.ranks_per_node} if self.num_nodes > 1 else {}
        found = {"link": self.link, "network": self.network}
        return {
            name: [{**speed, **split} for speed in speeds.to_json()]
            for name, speeds in found.items()
            if speeds is not None
        }

    def describe(self) -> list[str]:
        """A line for each speed of the links, and for the fastest way over the network."""
        lines = []
        if self.link is not None:
            speeds = self.link.speeds
            lines = [f"link: {speed.direction} on {speed.num_sms} SMs {speed.gbs:.1f} GB/s" for speed in speeds]
        if self.network is not None:
            best = f"{self.network.ceiling.gbs:.1f} GB/s, {self.network.describe()}"
            lines.append(f"network of {self.num_nodes} nodes: {best}; {self.network.carrier}")
        return lines
