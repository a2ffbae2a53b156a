"""What follows from the fields of a record: rates, ratios, shares."""

from __future__ import annotations

from deep_a2a.benchmark.wire_bytes import LINK_CLASSES, WireBytes


class Figures:
    """Base of `Record`, which has the fields and says what they are."""

    num_ranks: int
    ranks_per_node: int
    num_sms: int | None
    total_us: float
    baseline_us: float | None
    wire_bytes: WireBytes
    logical_bytes: int
    ceiling_gbs: float | None
    network_put_bytes: int | None
    network_least_bytes: int | None
    network_ceiling_gbs: float | None
    gemm_alone_us: float | None
    gemm_beside_us: float | None
    comm_alone_us: float | None
    both_us: float | None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the baseline."""
        return None if self.baseline_us is None else self.baseline_us / self.total_us

    @property
    def logical_gbs(self) -> float:
        """Logical bytes over total time, in 1e9 bytes a second."""
        return self.logical_bytes / self.total_us / 1e3

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def nvlink_gbs(self) -> float:
        """What NVLink carried for the busiest rank, in 1e9 bytes a second of total time."""
        return self.wire_bytes.nvlink / self.total_us / 1e3

    @property
    def network_gbs(self) -> float:
        """What the network carried for the busiest rank, in 1e9 bytes a second of total time."""
        return self.wire_bytes.network / self.total_us / 1e3

    @property
    def network_header_share(self) -> float | None:
        """What went to other nodes beside the rows that had to, as a share of these: 0.02 is 2 %."""
        if self.network_put_bytes is None or not self.network_least_bytes:
            return None
        return self.network_put_bytes / self.network_least_bytes - 1

    @property
    def slowest_class(self) -> str:
        """The link class that takes longest at the ceilings; of most bytes where there are none."""
        link_us = self.wire_bytes.link_us(self.ceiling_gbs, self.network_ceiling_gbs)
        return max(LINK_CLASSES, key=lambda name: (link_us.get(name, 0.0), getattr(self.wire_bytes, name)))

    @property
    def wire_gbs(self) -> float:
        """Bytes of the slowest link class over total time, in 1e9 bytes a second."""
        return int(getattr(self.wire_bytes, self.slowest_class)) / self.total_us / 1e3

    @property
    def link_efficiency(self) -> float | None:
        """Share of its measured ceiling that the slowest link class reaches."""
        link_us = self.wire_bytes.link_us(self.ceiling_gbs, self.network_ceiling_gbs)
        return max(link_us.values()) / self.total_us if link_us else None

    @property
    def gbs_per_sm(self) -> float | None:
        """What one SM moves, rows that stay on their GPU included, in 1e9 bytes a second."""
        return None if self.num_sms is None else self.logical_gbs / self.num_sms

    @property
    def share_hidden(self) -> float | None:
        """Of communication time, the part that does not show beside the products; their slowdown counts against it."""
        if self.gemm_alone_us is None or self.comm_alone_us is None or self.both_us is None:
            return None
        return (self.gemm_alone_us + self.comm_alone_us - self.both_us) / self.comm_alone_us

    @property
    def gemm_slowdown(self) -> float | None:
        """By how much longer the products take beside communication: 0.06 is 6 %."""
        if self.gemm_alone_us is None or self.gemm_beside_us is None:
            return None
        return self.gemm_beside_us / self.gemm_alone_us - 1
