"""What dispatch and combine can end with. Bad arguments are ``ValueError`` or ``TypeError``, as everywhere."""

from __future__ import annotations


class CommError(RuntimeError):
    """Base of everything that goes wrong between ranks."""


class CommTimeoutError(CommError):
    """This rank gave up waiting: names the step, the rank it waited for, what it expected and what it saw."""


class PeerAbortError(CommError):
    """Another rank gave up first; the message quotes what it reported."""


class CapacityError(CommError):
    """Some rank would have received more rows than its slot holds. Raised on every rank; the buffer stays usable."""


class MismatchError(CommError):
    """The ranks were given different settings. Raised on every rank."""


class LeaseError(CommError):
    """Every slot is leased: release a result, or ask for more ``num_slots``."""
