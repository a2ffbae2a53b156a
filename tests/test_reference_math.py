"""The oracle's arithmetic against exact fractions, one number at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import reference_math
import torch


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
    got = reference_math.fma(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(c))
    want = np.array([exact_fma(*triple) for triple in zip(a, b, c, strict=True)])
    assert got.numpy().view(np.uint32).tolist() == want.view(np.uint32).tolist()


def test_fma_rounds_once() -> None:
    """Here FP64 rounds the sum to a tie of FP32, which then goes the wrong way: the exact sum is just below it."""
    a, b = torch.tensor([1.0 + 2.0**-23]), torch.tensor([2.0**-24 * (1.0 - 2.0**-23)])
    assert reference_math.fma(a, b, a) == a
    assert (a.double() * b.double() + a.double()).float() == 1.0 + 2.0**-22


def test_special_values() -> None:
    inf, nan = math.inf, math.nan
    a, b, c = torch.tensor([[inf, 0.0, 2.0, 1.0], [1.0, inf, 3.0, -0.0], [1.0, 1.0, nan, -0.0]])
    got = reference_math.fma(a, b, c)
    assert got[0] == inf and got[1:3].isnan().all() and math.copysign(1, got[3].item()) == -1
    bits = reference_math.to_bf16(torch.tensor([nan, -nan, -0.0, inf, 3.4e38, 1e-40])).view(torch.int16)
    assert [b & 0xFFFF for b in bits.tolist()] == [0x7FFF, 0x7FFF, 0x8000, 0x7F80, 0x7F80, 0x0001]


def test_quantize_one_value_at_a_time() -> None:
    """Every group against the definition, with the nearest FP8 value found among all of them."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(48, 130, generator=random)
    x[:6] *= torch.tensor([1.0, 1e-30, 1e30, 0.0, 3e-3, 1.0])[:, None]
    x[4, 0], x[4, 1], x[5, 129] = math.nan, 0.0, -math.inf
    x = x.bfloat16()
    for fmt, largest in reference_math.FP8_LARGEST.items():
        codes = torch.arange(256, dtype=torch.uint8).view(reference_math.FP8_DTYPES[fmt]).float()
        finite = torch.tensor(sorted(set(codes[codes.isfinite()].tolist())), dtype=torch.float64)
        for scale_format in ["float32", "ue8m0"]:
            q, scales = reference_math.quantize(x, fmt, scale_format)
            assert q.dtype == reference_math.FP8_DTYPES[fmt] and scales.shape == (48, 2)
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
    assert reference_math.quantize(x, "fp8_e4m3", "float32")[0].view(torch.uint8)[5, 129] == 0x7F
