"""What a probe of `deep-a2a info` answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What a probe found. `remedy` says how to get what is not available; None where nothing is to be done."""

    available: bool
    detail: str
    remedy: str | None = None
