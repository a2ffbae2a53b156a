"""Dispatch and combine as differentiable functions.

The backward of a dispatch is a combine, the backward of a combine is a cached dispatch:

====================  ==========================================  ==========================================
gradient of           is computed                                 and travels
====================  ==========================================  ==========================================
a dispatched token    as the sum of its rows' gradients           in ``combine(weighted=False)``, BF16
a combined row        as ``w * g`` (``g`` itself, layout "rank")  in ``dispatch(handle=...)``, BF16 or FP8
a top-k weight        where the weight was applied                beside the token's gradient, as FP32 side
====================  ==========================================  ==========================================

Weights are applied in one of two places. Rows of layout "rank" the layer itself multiplies by the received weights, so
autograd knows their gradient. For layouts "expert" and "padded" ``combine`` multiplies, and its backward forms
``dot(row, g)``. Either way the outcome is the gradient of ``Dispatched.weights``, and the backward of dispatch alone
sends it home: one path for all layouts.

All ranks have to build the same graph, since the backward pass runs its collectives in the order of the graph. That
holds by itself when all ranks run the same model; a rank without tokens runs it on empty tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deep_a2a.payload import describe
from deep_a2a.quant import FP8_DTYPES, SCALE_DTYPES, dequantize

if TYPE_CHECKING:
    from deep_a2a import Buffer, DispatchHandle, DispatchResult


@dataclass(frozen=True)
class RowFormat:
    """What rows look like on the wire.

    quantize: None for BF16, else "fp8" / "fp8_e4m3" or "fp8_e5m2".
    scale_format: of the FP8 scales, "float32" or "ue8m0".

    Raises:
        ValueError: a field names no format.
    """

    quantize: str | None = None
    scale_format: str = "float32"

    def __post_init__(self) -> None:
        if self.quantize not in (None, "fp8", *FP8_DTYPES):
            raise ValueError(f"quantize must be None, 'fp8', 'fp8_e4m3' or 'fp8_e5m2', got {describe(self.quantize)}")
        if self.scale_format not in tuple(SCALE_DTYPES):
            raise ValueError(f"scale_format must be 'float32' or 'ue8m0', got {describe(self.scale_format)}")


BF16 = RowFormat()


def as_row_format(name: str, value: RowFormat | str) -> RowFormat:
    """`value`, or the `RowFormat` whose `quantize` it is. Raises TypeError or ValueError that calls it `name`."""
    if isinstance(value, RowFormat):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a RowFormat or the name of an FP8 format, got {describe(value)}")
    try:
        return RowFormat(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@dataclass(frozen=True)
class Dispatched:
    """What this rank received, as part of the autograd graph.

    rows: bfloat16, shaped like `DispatchResult.x`; FP8 rows are dequantised. Zero in padding.
    weights: float32, the top-k weights of the rows. Layout "rank": [rank_rows, num_topk], 0 where the slot is not on
        this rank. Others: shaped like `DispatchResult.row_weights`, 0 in padding.
    result: the owned `DispatchResult`, for counts, offsets and the handle. Its tensors are not part of the graph.
    """

    rows: Tensor
    weights: Tensor
    result: DispatchResult


def dispatch(
    buffer: Buffer,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    row_format: RowFormat | str = BF16,
    lane: int = 0,
) -> Dispatched:
    """`Buffer.dispatch` with gradients for `x` and `topk_weights`.

    Args:
        buffer: of any layout.
        x: bfloat16 [tokens, hidden].
        topk_idx: int32 or int64 [tokens, num_topk], global experts; -1 for none.
        topk_weights: float32 [tokens, num_topk].
        row_format: of the rows that are sent; "fp8" is short for ``RowFormat("fp8")``. Quantisation passes the gradient
            through; it comes back in BF16.
        lane: of the buffer, also for the combine and for the backward pass of both.

    Raises what `Buffer.dispatch` raises.
    """
    row_format = as_row_format("row_format", row_format)
    received: list[DispatchResult] = []
    rows, weights = _Dispatch.apply(x, topk_weights, topk_idx, buffer, row_format, lane, received)  # type: ignore[no-untyped-call]
    return Dispatched(rows, weights, received[0])


def combine(buffer: Buffer, rows: Tensor, dispatched: Dispatched, *, grad_format: RowFormat | str = BF16) -> Tensor:
    """`Buffer.combine` with gradients for `rows` and, where combine applies them, for `dispatched.weights`.

    Args:
        buffer: the one that made `dispatched`.
        rows: bfloat16, shaped like `dispatched.rows`. Layout "rank": weighed by `dispatched.weights` and summed over
            this rank's experts. Others: the bare outputs of the experts, which combine multiplies by their weights.
        dispatched: where the rows belong.
        grad_format: of the gradient rows that the backward pass sends to the experts, for example
            ``RowFormat("fp8_e5m2")``, or just "fp8_e5m2".

    Returns:
        bfloat16 [tokens, hidden].

    Raises what `Buffer.combine` raises.
    """
    grad_format = as_row_format("grad_format", grad_format)
    out: Tensor = _Combine.apply(rows, dispatched.weights, dispatched.result.handle, buffer, grad_format)  # type: ignore[no-untyped-call]
    return out


def _bf16_rows(result: DispatchResult) -> Tensor:
    return result.x if result.scales is None else dequantize(result.x, result.scales)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_idx: Tensor,
        buffer: Buffer,
        row_format: RowFormat,
        lane: int,
        received: list[DispatchResult],
    ) -> tuple[Tensor, Tensor]:
        result = buffer.dispatch(
            x.contiguous(),
            topk_idx,
            topk_weights,
            quantize=row_format.quantize,
            scale_format=row_format.scale_format,
            output="owned",
            zero_padding=True,
            lane=lane,
        )
        received.append(result)
        ctx.buffer, ctx.handle = buffer, result.handle
        row_weights = result.row_weights
        weights = result.topk_weights if row_weights is None else row_weights
        # Aliases go into the graph, not the result's own tensors: whoever keeps a result for its counts would keep the
        # whole graph alive.
        return _bf16_rows(result).detach(), weights.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        # Which gradients are wanted follows from the model, so all ranks agree on whether there is a side.
        side = grad_weights.contiguous() if ctx.needs_input_grad[1] else None
        home = ctx.buffer.combine(grad_rows.contiguous(), ctx.handle, weighted=False, side=side, lane=ctx.handle.lane)
        return home.x, home.side, None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, handle: DispatchHandle, buffer: Buffer, grad_format: RowFormat
    ) -> Tensor:
        ctx.weighted = buffer.layout != "rank"
        if ctx.weighted:
            ctx.save_for_backward(rows, weights)
        ctx.buffer, ctx.handle, ctx.grad_format = buffer, handle, grad_format
        # Combine has the weights from the handle; here they only take part in the graph.
        return buffer.combine(rows.contiguous(), handle, weighted=ctx.weighted, lane=handle.lane).x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_format: RowFormat = ctx.grad_format
        is_kept = not ctx.weighted and grad_format.quantize is None
        result = ctx.buffer.dispatch(
            grad.contiguous(),
            handle=ctx.handle,
            quantize=grad_format.quantize,
            scale_format=grad_format.scale_format,
            output="owned" if is_kept else "leased",
            zero_padding=True,
            lane=ctx.handle.lane,
        )
        grad_rows = _bf16_rows(result)
        if not ctx.weighted:
            return grad_rows, None, None, None, None
        rows, weights = ctx.saved_tensors
        grad_rows = grad_rows.float()
        grad_weights = (rows.float() * grad_rows).sum(-1) if ctx.needs_input_grad[1] else None
        return (weights.unsqueeze(-1) * grad_rows).to(rows.dtype), grad_weights, None, None, None
