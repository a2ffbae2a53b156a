"""Bytes that dispatch and combine move, by what carries them: means over the routing, of the GPU that has most of them.

Every rank has as many tokens to send. A rank row goes from its writer (the source, or on another node the rank with the
source's local index) to its rank; a token crosses to each other node once. Combine is the same backwards: rank rows
come to the writer, one sum for each token and node goes back. In the layouts `expert` and `padded` the receiver pulls a
rank row once and doubles it at home, and in combine adds a rank's experts first; between nodes it is taken to pull from
the relay as it does from the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from . import wire
from .spread import Spread
from .workload import Workload

Op = Literal["dispatch", "combine"]


@dataclass(frozen=True)
class Traffic:
    """One operation. Rows and bytes are means, so they are no whole numbers.

    Attributes:
        row_bytes: payload and scales of a row.
        nvlink_rows, network_rows: rows that leave or enter the busiest GPU, the larger of both: wire rows.
        logical_rows: rank rows that the busiest GPU receives, its own included.
        node_rows: for a source's tokens the different nodes, its own included, added up: the rows that others count
            for the network.
        nvlink_out, nvlink_in, network_out, network_in: bytes with all headers and counts.
        sm_out, sm_in: bytes that a GPU's SMs store and load, rows for its own memory included.
        each_sm_in: bytes that every SM loads for itself, however many there are (D3 reads all counts).
        memory: bytes that go in and out of the GPU's memory.
    """

    op: Op
    row_bytes: int
    nvlink_rows: float
    network_rows: float
    logical_rows: float
    node_rows: float
    nvlink_out: float
    nvlink_in: float
    network_out: float
    network_in: float
    sm_out: float
    sm_in: float
    each_sm_in: float
    memory: float

    @property
    def nvlink_wire_bytes(self) -> float:
        return self.nvlink_rows * self.row_bytes

    @property
    def network_wire_bytes(self) -> float:
        return self.network_rows * self.row_bytes

    @property
    def logical_bytes(self) -> float:
        return self.logical_rows * self.row_bytes


@dataclass(frozen=True)
class Rows:
    """Rows of one rank in a dispatch; in combine they go the other way."""

    tokens: int
    to_own_node: float  # of its own tokens
    written: float  # rank rows that it writes, as source and as relay
    written_here: float  # of these, to itself
    received: float
    received_slots: float
    sent_to_nodes: float
    relayed: float
    # Rows of `x` that cross NVLink: a row for all experts of a rank, but for each where a relay stores to experts.
    near_out: float
    near_in: float
    # Where rows are pulled: those that come from the own node, and the rows of `x` that this rank stores as a relay.
    pulled: float
    relayed_slots: float


def count_rows(workload: Workload, spread: Spread) -> list[Rows]:
    """Of every rank."""
    tokens, nodes, locals_ = workload.num_tokens, workload.num_nodes, workload.ranks_per_node
    rows = []
    for rank in range(workload.num_ranks):
        node = rank // locals_
        ranks = slice(node * locals_, (node + 1) * locals_)
        on_node, slots_on_node = sum(spread.rank_hits[ranks]), sum(spread.rank_slots[ranks])
        hits, slots = spread.rank_hits[rank], spread.rank_slots[rank]
        copies, copies_on_node = (hits, on_node) if workload.layout == "rank" else (slots, slots_on_node)
        rows.append(
            Rows(
                tokens=tokens,
                to_own_node=tokens * spread.node_hits[node],
                written=tokens * nodes * on_node,
                written_here=tokens * nodes * hits,
                received=tokens * workload.num_ranks * hits,
                received_slots=tokens * workload.num_ranks * slots,
                sent_to_nodes=tokens * (spread.nodes_per_token - spread.node_hits[node]),
                relayed=tokens * (nodes - 1) * spread.node_hits[node],
                near_out=tokens * (on_node - hits + (nodes - 1) * (copies_on_node - copies)),
                near_in=tokens * (locals_ - 1) * (hits + (nodes - 1) * copies),
                pulled=tokens * locals_ * hits,
                relayed_slots=tokens * (nodes - 1) * slots_on_node,
            )
        )
    return rows


def dispatch_traffic(workload: Workload, spread: Spread) -> Traffic:
    every = count_rows(workload, spread)
    row, record, stream = wire.row_bytes(workload), wire.record_bytes(workload), wire.stream_row_bytes(workload)
    pulled = workload.layout != "rank"
    counts, words = wire.count_vector_bytes(workload), wire.count_words_bytes(workload)
    nodes, locals_ = workload.num_nodes, workload.ranks_per_node
    # Each rank stores the vectors of its rail, its own with them, to all ranks of its node.
    counts_near, counts_far = nodes * (locals_ - 1) * words, (nodes - 1) * counts

    def sm_out(r: Rows) -> float:
        pulled_slots = r.received_slots / nodes  # what comes from each node is alike
        stored = (pulled_slots + r.relayed_slots) * row if pulled else r.written * row
        stored += r.written * record
        return stored + r.sent_to_nodes * stream + nodes * locals_ * words

    def sm_in(r: Rows) -> float:
        # A load serves all rows of a token on its node, and one more those of all other nodes.
        packed = r.tokens * row if nodes > 1 else 0.0
        own = r.pulled if pulled else r.to_own_node
        return own * row + r.relayed * stream + packed

    def memory(r: Rows) -> float:
        # Stream rows are stored, read by the network, stored by it, and read again.
        return (
            sm_in(r)
            + (r.received_slots if pulled else r.received) * row
            + r.received * record
            + 2 * (r.sent_to_nodes + r.relayed) * stream
        )

    return Traffic(
        op="dispatch",
        row_bytes=row,
        nvlink_rows=_most(every, _dispatched_out, _dispatched_in),
        network_rows=_most(every, _far_out, _far_in),
        logical_rows=_most(every, lambda r: r.received),
        node_rows=workload.num_tokens * spread.nodes_per_token,
        nvlink_out=_most(every, lambda r: _dispatched_out(r) * row + _near_out(r) * record) + counts_near,
        nvlink_in=_most(every, lambda r: _dispatched_in(r) * row + _near_in(r) * record) + counts_near,
        network_out=_most(every, _far_out) * stream + counts_far,
        network_in=_most(every, _far_in) * stream + counts_far,
        sm_out=_most(every, sm_out),
        sm_in=_most(every, sm_in),
        each_sm_in=workload.num_ranks * words,
        memory=_most(every, memory),
    )


def combine_traffic(workload: Workload, spread: Spread) -> Traffic:
    every = count_rows(workload, spread)
    row = wire.sum_bytes(workload)
    added_first = workload.layout != "rank"

    def sm_out(r: Rows) -> float:
        return (r.relayed + r.tokens + (r.received if added_first else 0.0)) * row

    def sm_in(r: Rows) -> float:
        return (r.written + r.sent_to_nodes + (r.received_slots if added_first else 0.0)) * row

    def memory(r: Rows) -> float:
        own_sums = r.received + r.received_slots if added_first else 0.0
        return (r.received + r.tokens + own_sums + 2 * (r.sent_to_nodes + r.relayed)) * row

    return Traffic(
        op="combine",
        row_bytes=row,
        nvlink_rows=_most(every, _near_out, _near_in),
        network_rows=_most(every, _far_out, _far_in),
        logical_rows=_most(every, lambda r: r.received),
        node_rows=workload.num_tokens * spread.nodes_per_token,
        nvlink_out=_most(every, _near_in) * row,
        nvlink_in=_most(every, _near_out) * row,
        network_out=_most(every, _far_in) * row,
        network_in=_most(every, _far_out) * row,
        sm_out=_most(every, sm_out),
        sm_in=_most(every, sm_in),
        each_sm_in=0.0,
        memory=_most(every, memory),
    )


def _dispatched_out(rows: Rows) -> float:
    return rows.near_out


def _dispatched_in(rows: Rows) -> float:
    return rows.near_in


def _near_out(rows: Rows) -> float:
    return rows.written - rows.written_here


def _near_in(rows: Rows) -> float:
    # Of `received`, the rank has written for itself what it wrote here.
    return rows.received - rows.written_here


def _far_out(rows: Rows) -> float:
    return rows.sent_to_nodes


def _far_in(rows: Rows) -> float:
    return rows.relayed


def _most(every: Iterable[Rows], *counts: Callable[[Rows], float]) -> float:
    return max(count(rows) for rows in every for count in counts)
