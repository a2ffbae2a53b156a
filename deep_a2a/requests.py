"""What callers ask of a Buffer, checked: requests that a backend can serve without looking at them again."""

from __future__ import annotations

from typing import Any

from deep_a2a.backend import Backend, CombineRequest, DispatchRequest, Halves
from deep_a2a.payload import check_combine, check_payload, check_routing, check_scale_layout, describe
from deep_a2a.results import DispatchHandle, Event
from deep_a2a.settings import Settings


def dispatch_request(
    settings: Settings,
    backend: Backend,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    handle: DispatchHandle | None,
    *,
    quantize: str | None,
    scale_format: str,
    scale_layout: str,
    host_sync: bool,
    output: str,
    zero_padding: bool,
    lane: int,
    halves: Halves,
    previous_event: Event | None,
) -> DispatchRequest:
    """Raises TypeError or ValueError. The handle is one of this Buffer."""
    where = backend.device
    payload = check_payload(x, quantize, scale_format, settings.hidden, settings.num_max_tokens_per_rank, where)
    if output not in ("leased", "owned"):
        raise ValueError(f"output must be 'leased' or 'owned', got {output!r}")
    idx = weights = None
    if handle is None:
        idx, weights = check_routing(topk_idx, topk_weights, payload.num_tokens, settings.num_topk, where)
    else:
        if topk_idx is not None or topk_weights is not None:
            raise ValueError("topk_idx and topk_weights must be None when a handle is given: it has both")
        if payload.num_tokens != handle.num_tokens:
            raise ValueError(f"x must have the handle's {handle.num_tokens} tokens, got {payload.num_tokens}")
    return DispatchRequest(
        payload,
        idx,
        weights,
        handle,
        lane=lane,
        fixed_shapes=not host_sync if handle is None else handle.fixed_shapes,
        owned=output == "owned",
        zero_padding=zero_padding,
        scale_layout=check_scale_layout(scale_layout, payload),
        halves=halves,
        previous=_check_event(previous_event),
    )


def combine_request(
    settings: Settings,
    backend: Backend,
    x: Any,
    handle: DispatchHandle,
    *,
    weighted: bool | None,
    side: Any,
    lane: int,
    halves: Halves,
    previous_event: Event | None,
) -> CombineRequest:
    """Raises TypeError or ValueError. The handle is one of this Buffer."""
    by_rank = settings.layout == "rank"
    if by_rank and weighted:
        raise ValueError("weighted must be None or False in layout 'rank', whose rows the layer has weighed, got True")
    row_shape = combine_shape(settings, backend, handle)
    side_shape = (*row_shape, settings.num_topk) if by_rank else row_shape
    rows, values = check_combine(x, (*row_shape, settings.hidden), side, side_shape, backend.device)
    return CombineRequest(
        rows,
        values,
        handle,
        lane=lane,
        weighted=not by_rank and weighted is not False,
        halves=halves,
        previous=_check_event(previous_event),
    )


def combine_shape(settings: Settings, backend: Backend, handle: DispatchHandle) -> tuple[int, ...]:
    """Of the rows that combine takes, without their channels."""
    shape = backend.shape
    if settings.layout == "padded":
        return (shape.num_local_experts, shape.slot_rows // shape.num_local_experts)
    if settings.layout == "expert":
        return (shape.slot_rows if handle.fixed_shapes else handle.num_rows or 0,)
    return (shape.slot_rank_rows if handle.fixed_shapes else handle.num_rank_rows or 0,)


def _check_event(event: Event | None) -> Event | None:
    if event is not None and not isinstance(event, Event):
        raise TypeError(
            f"previous_event must be None or the event of a result of deep_a2a, got {describe(event)}: let the current "
            "stream wait for other events"
        )
    return event
