"""The time between the two halves of an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from deep_a2a.results import CombineResult, DispatchResult

Result = TypeVar("Result")


class Pending(Generic[Result]):
    """The send half is launched; `recv()` launches the receive half, once, and returns the result.

    Every rank has to call `recv()`; until then the lane takes no other operation. The input has to stay as it is until
    ``sent()`` says so; lent tensors until the operation has been received, since peers read them. A dispatch whose
    tokens go between nodes in more than two rounds (``Buffer.staging_bytes``) reads its input in the receive half too:
    there ``sent()`` is true once it has been received, and never before `recv()`.
    """

    def __init__(self, receive: Callable[[], Result], sent: Callable[[], bool]) -> None:
        self._receive: Callable[[], Result] | None = receive
        self.sent = sent

    def recv(self) -> Result:
        receive, self._receive = self._receive, None
        if receive is None:
            raise RuntimeError("recv() was called twice: an operation is received once")
        return receive()


PendingDispatch = Pending[DispatchResult]
PendingCombine = Pending[CombineResult]
