"""The Buffer of a cell."""

from __future__ import annotations

from functools import partial

from deep_a2a import Buffer
from deep_a2a.benchmark.agreement import agree, attempt
from deep_a2a.benchmark.cell import Cell
from deep_a2a.benchmark.session import Session


def make_buffer(session: Session, cell: Cell, num_expert_rows: int, capacity: int) -> Buffer:
    """The Buffer that a cell asks for; MeasurementError on every rank where it cannot be made. Collective."""
    made: list[Buffer] = []
    construct = partial(
        Buffer,
        session.group,
        hidden=cell.hidden,
        num_experts=cell.num_experts,
        num_topk=cell.num_topk,
        num_max_tokens_per_rank=cell.num_tokens,
        ranks_per_node=cell.ranks_per_node,
        backend=cell.backend,
        layout=cell.layout,
        expert_capacity=capacity if cell.layout == "padded" else None,
        max_recv_rows=num_expert_rows if cell.layout == "expert" else None,
        timeout_s=session.timeout_s,
        num_sms=cell.num_sms,
        **session.place.buffer_options(cell.stream),
    )
    agree(session.group, attempt(lambda: made.append(construct())))
    return made[0]
