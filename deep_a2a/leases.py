"""Leases on slots: who may read a slot's rows, and when its writers may have it back."""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Release(Enum):
    """After what a slot is given back."""

    asked = "release(): after what is on the caller's current stream"
    dropped = "the result is gone: after what is on the stream that was current at its dispatch"
    unread = "nobody outside of the lane has read it: after what is on the lane"


class SlotUse(Protocol):
    """What a dispatch has made of a slot."""

    def end(self, release: Release) -> bool:
        """The slot's last reader is done. False where the end has to wait for a later call."""


class Lease:
    """The right to one slot, given back once."""

    def __init__(self, slots: Slots, slot: int) -> None:
        self.slot = slot
        self._slots: Slots | None = slots
        self._use: SlotUse | None = None

    def bind(self, use: SlotUse) -> None:
        """What the dispatch makes of the slot: it has to be over before the slot is free."""
        self._use = use

    def release(self) -> None:
        """As the caller asks."""
        self.end(Release.asked)

    def end(self, release: Release) -> None:
        slots, self._slots = self._slots, None
        if slots is None:
            return
        try:
            slots.give_back(self.slot, self._use, release)
        except BaseException:
            self._slots = slots  # nothing was given back
            raise


class Slots(Protocol):
    """Where leases come from."""

    def give_back(self, slot: int, use: SlotUse | None, release: Release) -> None: ...
