"""The oracle against brute force: one token, one slot and one number at a time, with exact fractions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import reference
import torch
from reference import Setting
from test_reference_math import bf16_bits, bf16_value, exact_fma

SETTINGS = [
    Setting(1, 1, 3, 2),
    Setting(4, 4, 8, 4, "expert", expert_alignment=3),
    Setting(4, 2, 8, 4, "rank"),
    Setting(4, 2, 8, 4, "expert"),
    Setting(6, 3, 6, 3, "padded", expert_capacity=30),
    Setting(4, 1, 4, 4, "expert", expert_alignment=2),
    Setting(2, 1, 16, 8, "expert"),
    Setting(2, 2, 16, 8, "padded", expert_capacity=10),
]
HIDDEN = 5


def random_routing(setting: Setting, random: torch.Generator) -> list[torch.Tensor]:
    """Some slots without an expert, some experts named twice by a token."""
    counts = torch.randint(0, 6, (setting.num_ranks,), generator=random).tolist()
    routing = []
    for count in counts:
        idx = torch.randint(0, setting.num_experts, (count, setting.num_topk), generator=random)
        routing.append(torch.where(torch.rand(idx.shape, generator=random) < 0.3, -1, idx))
    return routing


def random_bf16(random: torch.Generator, *shape: int) -> torch.Tensor:
    """Few different numbers: ties, cancellations and negative zeros are frequent."""
    values = torch.randint(-5, 6, shape, generator=random).float() * 1.265625
    return torch.where(values == 0, -0.0, values).bfloat16()


def random_weights(random: torch.Generator, *shape: int) -> torch.Tensor:
    """Nearly the same or the opposite of each other, so that sums cancel and show what a product's rounding lost."""
    last_bits = torch.randint(0, 8, shape, generator=random).float() * 2.0**-23
    sign = torch.randint(0, 2, shape, generator=random) * 2 - 1
    return sign * (0.7 + last_bits)


@dataclass
class Sample:
    """Random data of all ranks, and where brute force puts the row of each top-k slot."""

    setting: Setting
    topk_idx: list[torch.Tensor]
    weights: list[torch.Tensor]
    payload: list[torch.Tensor]
    scales: list[torch.Tensor]
    rows: dict[tuple[int, int, int], int]  # row of x at the owner of the expert, by source, token and slot

    @property
    def tokens(self) -> list[tuple[int, int]]:
        return [(source, token) for source, idx in enumerate(self.topk_idx) for token in range(len(idx))]

    def slots(self, rank: int) -> list[tuple[int, int, int, int]]:
        """(source, token, slot, local expert) of all slots whose expert `rank` owns."""
        first = rank * self.setting.num_local_experts
        return [
            (source, token, k, expert - first)
            for source, token in self.tokens
            for k, expert in enumerate(self.topk_idx[source][token].tolist())
            if first <= expert < first + self.setting.num_local_experts
        ]


@pytest.fixture(params=range(8))
def random(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(request.param)


@pytest.fixture(params=SETTINGS, ids=str)
def sample(request: pytest.FixtureRequest, random: torch.Generator) -> Sample:
    setting: Setting = request.param
    topk_idx = random_routing(setting, random)
    weights = [random_weights(random, *idx.shape) for idx in topk_idx]
    payload = [random_bf16(random, len(idx), HIDDEN) for idx in topk_idx]
    scales = [torch.rand(len(idx), 1, generator=random) for idx in topk_idx]
    return Sample(setting, topk_idx, weights, payload, scales, {})


def dispatch(sample: Sample) -> list[reference.Dispatched]:
    return reference.dispatch(sample.setting, sample.payload, sample.scales, sample.topk_idx, sample.weights)


def place_rows(sample: Sample, rank: int) -> list[int]:
    """Gives every slot of `rank` its row; returns the starts of the experts' groups and the end."""
    setting, slots, row = sample.setting, sample.slots(rank), 0
    if setting.layout == "rank":
        tokens = sorted({(source, token) for source, token, _, _ in slots})
        sample.rows |= {(source, token, k): tokens.index((source, token)) for source, token, k, _ in slots}
        return [0, len(tokens)]
    starts = []
    for expert in range(setting.num_local_experts):
        starts.append(row)
        for source, token, k, local in slots:
            if local == expert:
                sample.rows[source, token, k] = row
                row += 1
        while row % setting.expert_alignment or (setting.layout == "padded" and row % setting.expert_capacity):
            row += 1
        if setting.layout == "padded" and row == starts[-1]:
            row += setting.expert_capacity
    return [*starts, row]


def test_dispatch(sample: Sample) -> None:
    setting = sample.setting
    for rank, got in enumerate(dispatch(sample)):
        starts, slots = place_rows(sample, rank), sample.slots(rank)
        rank_tokens = sorted({(source, token) for source, token, _, _ in slots})
        assert [sample.tokens[i] for i in got.rank_tokens.tolist()] == rank_tokens
        assert got.rows_per_rank.tolist() == [
            sum(s == source for s, _ in rank_tokens) for source in range(setting.num_ranks)
        ]
        assert got.rows_per_expert.tolist() == [
            sum(local == expert for *_, local in slots) for expert in range(setting.num_local_experts)
        ]
        chosen = [expert for idx in sample.topk_idx for expert in idx.flatten().tolist()]
        assert got.expert_load.tolist() == [chosen.count(expert) for expert in range(setting.num_experts)]
        assert got.scales is not None and len(got.x) == len(got.scales) == starts[-1]
        if setting.layout == "rank":
            assert got.expert_offsets is None and got.expert_rows is None and got.row_weights is None
        else:
            assert got.expert_offsets is not None and got.expert_offsets.tolist() == starts
        local_idx = torch.full((len(rank_tokens), setting.num_topk), -1)
        expert_rows, weights = local_idx.clone(), torch.zeros(local_idx.shape)
        for source, token, k, local in slots:
            rank_row, row = rank_tokens.index((source, token)), sample.rows[source, token, k]
            local_idx[rank_row, k], expert_rows[rank_row, k] = local, row
            weights[rank_row, k] = sample.weights[source][token, k]
            assert torch.equal(got.x[row], sample.payload[source][token])
            assert torch.equal(got.scales[row], sample.scales[source][token])
            assert got.row_weights is None or got.row_weights[row] == sample.weights[source][token, k]
        assert torch.equal(got.topk_idx, local_idx.int()) and torch.equal(got.topk_weights, weights)
        assert got.expert_rows is None or torch.equal(got.expert_rows, expert_rows.int())
        padding = set(range(starts[-1])) - {sample.rows[source, token, k] for source, token, k, _ in slots}
        assert padding == set((got.row_tokens < 0).nonzero().flatten().tolist())


def test_combine(sample: Sample, random: torch.Generator) -> None:
    dispatched = dispatch(sample)
    for rank in range(sample.setting.num_ranks):
        place_rows(sample, rank)
    outputs = [random_bf16(random, len(got.x), HIDDEN) for got in dispatched]
    sources = reference.token_sources(sample.topk_idx)
    for weighted in [False] if sample.setting.layout == "rank" else [False, True]:
        got_sums = reference.combine(sample.setting, dispatched, sources, outputs, weighted)
        for source, token in sample.tokens:
            want = [sum_token(sample, source, token, outputs, channel, weighted) for channel in range(HIDDEN)]
            assert got_sums[source][token].view(torch.int16).tolist() == [int(bits.view(np.int16)) for bits in want]


def sum_token(
    sample: Sample, source: int, token: int, outputs: list[torch.Tensor], channel: int, weighted: bool
) -> np.uint16:
    """The BF16 bits of one channel of one token's sum."""
    setting, total = sample.setting, None
    for node in range(setting.num_nodes):
        node_sum = None
        for rank in range(node * setting.ranks_per_node, (node + 1) * setting.ranks_per_node):
            term = None
            for k, expert in enumerate(sample.topk_idx[source][token].tolist()):
                if expert < 0 or expert // setting.num_local_experts != rank:
                    continue
                value = np.float32(outputs[rank][sample.rows[source, token, k], channel].item())
                weight = np.float32(sample.weights[source][token, k].item() if weighted else 1.0)
                if setting.layout == "rank":
                    term = value
                else:
                    term = weight * value if term is None else exact_fma(weight, value, term)
            if term is not None:
                term = bf16_value(bf16_bits(term))
                node_sum = term if node_sum is None else node_sum + term
        if node_sum is not None:
            if node != source // setting.ranks_per_node:
                node_sum = bf16_value(bf16_bits(node_sum))
            total = node_sum if total is None else total + node_sum
    return bf16_bits(np.float32(0.0) if total is None else total)


def test_side(sample: Sample, random: torch.Generator) -> None:
    dispatched = dispatch(sample)
    for rank in range(sample.setting.num_ranks):
        place_rows(sample, rank)
    by_slot = sample.setting.layout == "rank"
    values = [
        torch.randn(len(got.x), *([sample.setting.num_topk] if by_slot else []), generator=random) for got in dispatched
    ]
    got_side = reference.side(sample.setting, dispatched, reference.token_sources(sample.topk_idx), values)
    want_side = [torch.zeros(idx.shape) for idx in sample.topk_idx]
    for (source, token, k), row in sample.rows.items():
        owner = int(sample.topk_idx[source][token, k]) // sample.setting.num_local_experts
        want_side[source][token, k] = values[owner][row, k] if by_slot else values[owner][row]
    assert all(torch.equal(got, want) for got, want in zip(got_side, want_side, strict=True))


def test_wire_rows() -> None:
    """Counted by hand. Two nodes of two ranks, two experts each."""
    topk_idx = [
        torch.tensor([[0, 1, 2], [4, 5, 6], [-1, -1, -1]]),  # own and neighbour; two ranks of the other node
        torch.tensor([[6, 7, 0]]),
        torch.empty(0, 3, dtype=torch.int64),
        torch.tensor([[6, 7, -1]]),
    ]
    setting = Setting(4, 2, 8, 3, "rank")
    assert reference.wire_rows(setting, topk_idx) == ([1, 1, 1, 0], [1, 1, 0, 0])
    assert reference.wire_rows(setting, topk_idx, combining=True) == ([1, 1, 1, 0], [0, 0, 1, 1])
    by_expert = Setting(4, 2, 8, 3, "expert")
    assert reference.wire_rows(by_expert, [topk_idx[3], *topk_idx[1:]]) == ([0, 1, 2, 0], [1, 1, 0, 0])
