"""The oracle against brute force: one token, one slot and one number at a time, with exact fractions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from reference import Setting

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


def exact_fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """Of the floats around the exact result the nearest, of two equally near ones the even one. Finite values only."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return a * b + c  # the sign of a zero: no rounding is at stake
    guess = np.float32(float(exact))
    around = [guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))]
    best = min(around, key=lambda f: (abs(Fraction(float(f)) - exact), int(f.view(np.uint32)) & 1))
    return np.float32(math.copysign(float(best), exact.numerator))


def bf16_bits(value: np.float32) -> np.uint16:
    """The nearest BF16, found by trying the two around it. Finite values only."""
    low = int(value.view(np.uint32)) >> 16
    exact = Fraction(float(value))
    around = [np.uint16(low), np.uint16(low + 1)]
    return min(around, key=lambda bits: (abs(Fraction(float(bf16_value(bits))) - exact), int(bits) & 1))


def bf16_value(bits: np.uint16) -> np.float32:
    return np.uint32(int(bits) << 16).view(np.float32)


def test_fma_against_fractions() -> None:
    """Ordinary numbers, near-cancellations, ties of the sum, and results among the subnormal numbers."""
    random = np.random.default_rng(5)
    n = 4000
    a = random.normal(size=n).astype(np.float32)
    b = random.normal(size=n).astype(np.float32)
    scale = np.exp2(random.integers(-50, 50, size=n)).astype(np.float32)
    c = np.where(random.random(n) < 0.5, -a * b, a * b) * np.where(random.random(n) < 0.5, np.float32(1), scale)
    tiny = np.where(random.random(n) < 0.2, np.float32(2.0**-70), np.float32(1))
    a, b, c = a * tiny, b * tiny, c * tiny * tiny
    assert a.dtype == b.dtype == c.dtype == np.float32
    got = reference.fma(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(c))
    want = np.array([exact_fma(*triple) for triple in zip(a, b, c, strict=True)])
    assert got.numpy().view(np.uint32).tolist() == want.view(np.uint32).tolist()


def test_fma_rounds_once() -> None:
    """Here FP64 rounds the sum to a tie of FP32, which then goes the wrong way: the exact sum is just below it."""
    a, b = torch.tensor([1.0 + 2.0**-23]), torch.tensor([2.0**-24 * (1.0 - 2.0**-23)])
    assert reference.fma(a, b, a) == a
    assert (a.double() * b.double() + a.double()).float() == 1.0 + 2.0**-22


def test_special_values() -> None:
    inf, nan = math.inf, math.nan
    a, b, c = torch.tensor([[inf, 0.0, 2.0, 1.0], [1.0, inf, 3.0, -0.0], [1.0, 1.0, nan, -0.0]])
    got = reference.fma(a, b, c)
    assert got[0] == inf and got[1:3].isnan().all() and math.copysign(1, got[3].item()) == -1
    bits = reference.to_bf16(torch.tensor([nan, -nan, -0.0, inf, 3.4e38, 1e-40])).view(torch.int16)
    assert [b & 0xFFFF for b in bits.tolist()] == [0x7FFF, 0x7FFF, 0x8000, 0x7F80, 0x7F80, 0x0001]


def test_quantize_one_value_at_a_time() -> None:
    """Every group against the definition, with the nearest FP8 value found among all of them."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(48, 130, generator=random)
    x[:6] *= torch.tensor([1.0, 1e-30, 1e30, 0.0, 3e-3, 1.0])[:, None]
    x[4, 0], x[4, 1], x[5, 129] = math.nan, 0.0, -math.inf
    x = x.bfloat16()
    for fmt, largest in reference.FP8_LARGEST.items():
        codes = torch.arange(256, dtype=torch.uint8).view(reference.FP8_DTYPES[fmt]).float()
        finite = torch.tensor(sorted(set(codes[codes.isfinite()].tolist())), dtype=torch.float64)
        for scale_format in ["float32", "ue8m0"]:
            q, scales = reference.quantize(x, fmt, scale_format)
            assert q.dtype == reference.FP8_DTYPES[fmt] and scales.shape == (48, 2)
            for t in range(48):
                for group, channels in enumerate([range(128), range(128, 130)]):
                    amax = max([2.0**-96, *(abs(v) for c in channels if not math.isnan(v := x[t, c].item()))])
                    if math.isinf(amax):
                        assert scales[t, group].item() == (math.inf if scale_format == "float32" else 254)
                        continue
                    if scale_format == "float32":
                        assert scales[t, group] == np.float32(amax) / np.float32(largest)
                        inverse = float(np.float32(largest) / np.float32(amax))
                    else:
                        power = scales[t, group].item() - 127
                        assert 2.0 ** (power - 1) < np.float32(amax) / np.float32(largest) <= 2.0**power
                        inverse = 2.0**-power
                    for c in channels:
                        value, code = x[t, c].item(), q[t, c].float().item()
                        if math.isnan(value):
                            assert q.view(torch.uint8)[t, c] == 0x7F
                            continue
                        exact = np.float32(value) * np.float32(inverse)
                        error = (finite - float(exact)).abs()
                        assert abs(code - float(exact)) == error.min()
                        if (error == error.min()).sum() == 2:
                            assert q.view(torch.uint8)[t, c] % 2 == 0
    assert reference.quantize(x, "fp8_e4m3", "float32")[0].view(torch.uint8)[5, 129] == 0x7F


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
    assert reference.wire_rows(setting, topk_idx, combining=True) == ([1, 1, 0, 1], [0, 0, 1, 1])
    by_expert = Setting(4, 2, 8, 3, "expert")
    assert reference.wire_rows(by_expert, [topk_idx[3], *topk_idx[1:]]) == ([0, 1, 2, 0], [1, 1, 0, 0])
