"""Bytes of an operation by what carries them."""

from __future__ import annotations

from dataclasses import dataclass

LINK_CLASSES = ("nvlink", "network", "shm")


@dataclass(frozen=True)
class WireBytes:
    """Bytes of rows (payload and scales) that leave or enter the busiest rank, by link class.

    For each class the larger of bytes sent and bytes received, of the rank where that is largest.
    """

    nvlink: int = 0
    network: int = 0
    shm: int = 0

    def __post_init__(self) -> None:
        for name in LINK_CLASSES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"wire_bytes.{name} is {value!r}; expected a number of bytes, 0 or more")

    def __add__(self, other: WireBytes) -> WireBytes:
        """Of two operations after each other."""
        return WireBytes(**{name: getattr(self, name) + getattr(other, name) for name in LINK_CLASSES})

    @property
    def total(self) -> int:
        """Bytes of all classes."""
        return self.nvlink + self.network + self.shm

    @property
    def slowest(self) -> int:
        """Bytes of the class that carries most."""
        return max(self.nvlink, self.network, self.shm)

    def link_us(self, near_gbs: float | None, network_gbs: float | None) -> dict[str, float]:
        """How long each class takes at its ceiling: `near_gbs` within a node, `network_gbs` between nodes.

        Without a ceiling of its own the network is the same memory, as on the cpu backend. Classes that have no bytes,
        or no ceiling, are left out.
        """
        ceilings = {"nvlink": near_gbs, "shm": near_gbs, "network": network_gbs or near_gbs}
        return {
            name: getattr(self, name) / gbs / 1e3
            for name, gbs in ceilings.items()
            if gbs is not None and getattr(self, name) > 0
        }


def link_time_ratio(
    total_us: float, wire: WireBytes, ceiling_gbs: float | None, network_ceiling_gbs: float | None
) -> float | None:
    """The total over the time of the link class that takes longest at its ceiling; None where nothing has one."""
    longest_us = max(wire.link_us(ceiling_gbs, network_ceiling_gbs).values(), default=0.0)
    return round(total_us / longest_us, 3) if longest_us > 0 else None
