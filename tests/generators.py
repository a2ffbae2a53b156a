"""What the tests do with a buffer, as plain data: cases written down, drawn by hypothesis, or in long rows."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import reference
import torch
from backends import EMULATED_SMS, NODES, USUAL_NODES
from hypothesis import strategies as st

LAYOUTS = ("rank", "expert", "padded")
ROUTINGS = ("uniform", "sparse", "one_expert", "one_rank", "nowhere", "repeated")
# "fp8_*" with the scale format: rows that the caller has quantized. "cast": BF16 rows that dispatch quantizes.
PAYLOADS = (
    "bf16",
    "fp8_e4m3:float32",
    "fp8_e4m3:ue8m0",
    *(["fp8_e4m3:e8m0fnu"] if hasattr(torch, "float8_e8m0fnu") else []),  # the same, as torch's dtype of that name
    "fp8_e5m2:float32",
    "fp8_e5m2:ue8m0",
    "cast fp8_e4m3:float32",
    "cast fp8_e4m3:ue8m0",
    "cast fp8_e5m2:float32",
    "cast fp8_e5m2:ue8m0",
)
# Fields of a case that are simply on or off.
MODES = (
    "default_weights",
    "host_sync",
    "zero_padding",
    "column_major",
    "lent",
    "strided",
    "halves",
    "async_op",
    "weighted",
    "side",
    "cached",
)


@dataclass(frozen=True)
class Case:
    """One dispatch, one combine, and a second pair of them with the first one's handle if `cached`."""

    topology: str = "2x4"
    backend: str = "cpu"
    layout: str = "rank"
    hidden: int = 64
    local_experts: int = 4
    num_topk: int = 4
    max_tokens: int = 8
    tokens: tuple[int, ...] = (5, 8, 0, 1, 7, 3, 8, 2)  # by rank; as many as there are ranks are used
    routing: str = "uniform"
    payload: str = "bf16"
    expert_alignment: int = 1
    expert_capacity: int | None = None
    num_slots: int = 2
    num_lanes: int = 1
    staging_tokens: int | None = None  # of a source, that have room between nodes in one round; None for all at once
    num_sms: int | None = None
    stream: str = "own"
    network_seed: int | None = None  # CPU: disturbed traffic between nodes; others: delays before releases
    idx_dtype: torch.dtype = torch.int64
    default_weights: bool = False
    host_sync: bool = True
    output: str = "leased"
    zero_padding: bool = False
    column_major: bool = False  # of no meaning where rows have no scales
    lent: bool = False
    strided: bool = False  # input rows lie further apart than they are long
    halves: bool = False
    async_op: bool = False
    weighted: bool = True
    side: bool = False
    cached: bool = False
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return int(self.topology.split("x")[0]) * self.ranks_per_node

    @property
    def ranks_per_node(self) -> int:
        return int(self.topology.split("x")[1])

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.local_experts

    @property
    def fmt(self) -> str:
        """Format of the rows on the wire: "bf16" or an FP8 format."""
        return self.payload.split()[-1].split(":")[0]

    @property
    def scale_format(self) -> str:
        return "ue8m0" if self.payload.endswith(("ue8m0", "e8m0fnu")) else "float32"

    @property
    def is_cast(self) -> bool:
        return self.payload.startswith("cast")

    @property
    def scale_layout(self) -> str:
        return "column_major" if self.column_major and self.fmt != "bf16" else "row_major"

    @property
    def is_weighted(self) -> bool:
        return self.weighted and self.layout != "rank"

    @property
    def capacity(self) -> int:
        """Rows per expert with layout "padded": more than the default when a token may take several."""
        most = self.num_ranks * self.max_tokens * (self.num_topk if self.routing == "repeated" else 1)
        return self.expert_capacity or most

    @property
    def staging_bytes(self) -> int | None:
        """Room for two rounds of every stream, in and out."""
        if self.staging_tokens is None:
            return None
        num_streams = max(self.num_ranks // self.ranks_per_node - 1, 1)
        scale_bytes = -(-self.hidden // 128) * 4
        row_bytes = 2 * self.hidden + -(-scale_bytes // 128) * 128 + 16 * self.num_topk
        return 2 * 2 * num_streams * row_bytes * self.staging_tokens

    def buffer_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "hidden": self.hidden,
            "num_experts": self.num_experts,
            "num_topk": self.num_topk,
            "num_max_tokens_per_rank": self.max_tokens,
            "ranks_per_node": self.ranks_per_node,
            "backend": self.backend,
            "num_sms": self.num_sms,
            "stream": self.stream,
            "layout": self.layout,
            "num_slots": self.num_slots,
            "num_lanes": self.num_lanes,
            "staging_bytes": self.staging_bytes,
            "timeout_s": 30.0,
            "network_seed": self.network_seed,
        }
        if self.layout == "expert":
            arguments["expert_alignment"] = self.expert_alignment
            if self.routing == "repeated":
                padding = self.local_experts * (self.expert_alignment - 1)
                arguments["max_recv_rows"] = self.num_ranks * self.max_tokens * self.num_topk + padding
        if self.layout == "padded":
            arguments["expert_capacity"] = self.capacity
        return arguments

    def setting(self) -> reference.Setting:
        return reference.Setting(
            num_ranks=self.num_ranks,
            ranks_per_node=self.ranks_per_node,
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            layout=self.layout,
            expert_alignment=self.expert_alignment if self.layout == "expert" else 1,
            expert_capacity=self.capacity,
        )


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def case_on(backend: str, **fields: Any) -> Case:
    """A case of `fields`, with the backend's usual ranks and SMs where they say nothing else."""
    num_sms = EMULATED_SMS if backend == "emulated" else None
    return Case(**{"topology": USUAL_NODES[backend][0], "backend": backend, "num_sms": num_sms, **fields})


def random_tokens(numbers: random.Random, num_ranks: int, max_tokens: int) -> tuple[int, ...]:
    return tuple(numbers.choice([0, max_tokens, numbers.randint(0, max_tokens)]) for _ in range(num_ranks))


def rounds(case: Case, num_rounds: int, seed: int) -> list[Case]:
    """`num_rounds` cases for one buffer, that of `case`: token counts, routing, payload and modes differ."""
    numbers = random.Random(seed)
    payloads = [payload for payload in PAYLOADS if payload == "bf16" or case.hidden % 16 == 0]
    routings = [routing for routing in ROUTINGS if routing != "repeated" or case.layout == "rank"]  # else: larger slots
    chosen = []
    for _ in range(num_rounds):
        modes: dict[str, Any] = {mode: numbers.random() < 0.5 for mode in MODES}
        modes |= {
            "seed": numbers.randrange(1 << 30),
            "tokens": random_tokens(numbers, case.num_ranks, case.max_tokens),
            "routing": numbers.choice(routings),
            "payload": numbers.choice(payloads),
            "idx_dtype": numbers.choice([torch.int32, torch.int64]),
            "output": numbers.choice(["leased", "owned"]),
        }
        chosen.append(replace(case, **modes))
    return chosen


@st.composite
def cases(draw: st.DrawFn, backend: str) -> Case:
    """Any case of a few tokens. It shrinks towards one rank, one token, one expert, and all modes off."""
    topology = draw(st.sampled_from(NODES[backend]))
    num_ranks = Case(topology).num_ranks
    payload = draw(st.sampled_from(PAYLOADS))
    local_experts = draw(st.integers(1, 6))
    max_tokens = draw(st.integers(1, 9))
    return case_on(
        backend,
        topology=topology,
        layout=draw(st.sampled_from(LAYOUTS)),
        hidden=draw(st.integers(1, 20)) * (8 if payload == "bf16" else 16),
        local_experts=local_experts,
        num_topk=draw(st.integers(1, min(32, num_ranks * local_experts))),
        max_tokens=max_tokens,
        tokens=tuple(draw(st.lists(st.integers(0, max_tokens), min_size=num_ranks, max_size=num_ranks))),
        routing=draw(st.sampled_from(ROUTINGS)),
        payload=payload,
        expert_alignment=draw(st.sampled_from([1, 4, 7])),
        num_slots=draw(st.integers(1, 3)),
        staging_tokens=draw(st.none() | st.integers(1, 3)),
        num_sms=None if backend == "cpu" else draw(st.integers(1, 5)),
        stream="own" if backend == "cpu" else draw(st.sampled_from(["own", "current"])),
        network_seed=draw(st.none() | st.integers(0, 1000)),
        idx_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        output=draw(st.sampled_from(["leased", "owned"])),
        seed=draw(st.integers(0, 1 << 30)),
        **{mode: draw(st.booleans()) for mode in MODES},
    )
