"""The FP8 cast, bit by bit, against the same formulas one value at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scalar_casts import FORMATS, Format, cast_group, to_float32

from deep_a2a import quant

GROUP = 128
by_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
by_scale = pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])


def assert_like_scalars(x: torch.Tensor, fmt: Format, scale_format: str) -> None:
    q, scales = quant.quantize(x, fmt.name, scale_format)
    assert q.dtype == quant.FP8_DTYPES[fmt.name]
    assert scales.dtype == (torch.float32 if scale_format == "float32" else torch.uint8)
    codes, numbers = [], []
    for row in x.tolist():
        results = [cast_group(row[start : start + GROUP], fmt, scale_format) for start in range(0, len(row), GROUP)]
        codes.append([code for part, _ in results for code in part])
        numbers.append([scale for _, scale in results])
    expected_scales = torch.tensor(numbers, dtype=torch.float64)
    got_scales = scales.double() if scale_format == "float32" else 2.0 ** (scales.double() - 127)
    assert torch.equal(got_scales, expected_scales)
    got, expected = q.view(torch.uint8), torch.tensor(codes, dtype=torch.uint8)
    wrong = (got != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} codes differ, first at {wrong[0].tolist()}: x = {x[tuple(wrong[0])]}"


ALL_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)


@by_format
@by_scale
def test_every_bf16_alone(fmt: Format, scale_format: str) -> None:
    assert_like_scalars(ALL_BF16.unsqueeze(1), fmt, scale_format)


@by_format
@by_scale
@pytest.mark.parametrize("neighbour", [1.0, -torch.finfo(torch.bfloat16).max])
def test_every_bf16_beside_another(neighbour: float, fmt: Format, scale_format: str) -> None:
    """The neighbour sets the scale, so that all codes are met, those of subnormals and the ties between codes too."""
    beside = torch.full_like(ALL_BF16, neighbour)
    assert_like_scalars(torch.stack([ALL_BF16, beside], dim=1), fmt, scale_format)
    if neighbour == 1.0:
        q, _ = quant.quantize(torch.stack([ALL_BF16, beside], dim=1), fmt.name, scale_format)
        met = set(q.view(torch.uint8)[:, 0].tolist())
        not_met = {0xFF} | {code | sign for code in range(fmt.largest_code + 1, 0x7F) for sign in (0, 0x80)}
        assert met == set(range(256)) - not_met


float32_values = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


@by_format
@by_scale
@given(
    hidden=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-125, 120),
    special=st.lists(float32_values, max_size=4),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_rows_of_any_length(
    fmt: Format, scale_format: str, hidden: int, seed: int, exponent: int, special: list[float], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, hidden, generator=generator) * 2.0**exponent
    for value in special:
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = value
    assert_like_scalars(x.to(dtype), fmt, scale_format)


@pytest.mark.parametrize(
    ("fmt", "scale_format", "codes", "scale"),
    [
        ("fp8_e4m3", "float32", [0x7F, 0x7F, 0x7F, 0x00, 0x80, 0x00], math.inf),
        ("fp8_e5m2", "float32", [0x7F, 0x7F, 0x7F, 0x00, 0x80, 0x00], math.inf),
        ("fp8_e4m3", "ue8m0", [0x7E, 0xFE, 0x7F, 0x00, 0x80, 0x00], 254),
        ("fp8_e5m2", "ue8m0", [0x7B, 0xFB, 0x7F, 0x00, 0x80, 0x00], 254),
    ],
)
def test_infinity_takes_its_group_along_and_no_other(
    fmt: str, scale_format: str, codes: list[int], scale: float
) -> None:
    infinite = [math.inf, -math.inf, math.nan, 1.0, -1.0, 0.0]
    x = torch.tensor([infinite + [2.0] * (GROUP - len(infinite)) + [fp8_max := quant.FP8_MAX[fmt], -1.0]])
    q, scales = quant.quantize(x, fmt, scale_format)
    assert q.view(torch.uint8)[0, : len(codes)].tolist() == codes
    assert set(q[0, len(codes) : GROUP].tolist()) == {0.0}
    assert scales[0].tolist() == [scale, 1.0 if scale_format == "float32" else 127]
    assert q[0, GROUP:].float().tolist() == [fp8_max, -1.0]


@by_format
def test_zeros_and_nan_have_a_finite_scale(fmt: Format) -> None:
    x = torch.tensor([[0.0, -0.0], [math.nan, -math.nan], [math.nan, 0.0]])
    q, scales = quant.quantize(x, fmt.name)
    assert q.view(torch.uint8).tolist() == [[0x00, 0x80], [0x7F, 0x7F], [0x7F, 0x00]]
    assert scales.flatten().tolist() == [to_float32(2.0**-96 / fmt.largest)] * 3
    back = quant.dequantize(q, scales, torch.float32)
    assert back[0].tolist() == [0.0, -0.0] and back.isnan().tolist() == [[False] * 2, [True] * 2, [True, False]]


@by_format
def test_dequantize_multiplies_in_float32(fmt: Format) -> None:
    """Every code with scales of every size, rounded once to float32 and once more to bfloat16."""
    q = torch.arange(256, dtype=torch.uint8).view(quant.FP8_DTYPES[fmt.name]).unsqueeze(1)
    for scale in (1.0, 1 / 3, 2.0**-104 / 448, 1.1e-38, 7.5e35, math.inf):
        scales = torch.full((256, 1), scale)
        number = scales[0, 0].item()
        expected = torch.tensor([fmt.decode(code) * number for code in range(256)], dtype=torch.float64).float()
        got = quant.dequantize(q, scales, torch.float32)
        torch.testing.assert_close(got.squeeze(1), expected, rtol=0, atol=0, equal_nan=True)
        rounded = quant.dequantize(q, scales)
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.squeeze(1), expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_dequantize_takes_every_power_of_two() -> None:
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    q = torch.full((256, 1), 1.5).to(torch.float8_e4m3fn)
    got = quant.dequantize(q, scales, torch.float64).flatten()
    assert got[:255].tolist() == [1.5 * 2.0 ** (byte - 127) for byte in range(255)] and got[255].isnan()
    if hasattr(torch, "float8_e8m0fnu"):
        same = quant.dequantize(q, scales.view(torch.float8_e8m0fnu), torch.float64).flatten()
        torch.testing.assert_close(same, got, rtol=0, atol=0, equal_nan=True)


def test_dequantize_takes_packed_powers_of_two() -> None:
    for hidden, words in [(130, [[0x0000807F], [0x0000007F]]), (600, [[0x7F7E7D7C, 0x00000081], [0x7F7F7F7F, 0x7E]])]:
        q = torch.randn(2, hidden, generator=torch.Generator().manual_seed(hidden)).to(torch.float8_e4m3fn)
        packed = torch.tensor(words, dtype=torch.int32)
        groups = quant.num_scale_groups(hidden)
        single = [[word[group // 4] >> 8 * (group % 4) & 0xFF for group in range(groups)] for word in words]
        want = quant.dequantize(q, torch.tensor(single, dtype=torch.uint8), torch.float32)
        by_column = packed.T.contiguous().T
        for scales in (packed, by_column):
            assert torch.equal(quant.dequantize(q, scales, torch.float32), want)
        assert quant.dequantize(q[:0], by_column[:0]).shape == (0, hidden)


@by_format
@by_scale
@given(hidden=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_what_the_round_trip_may_lose(fmt: Format, scale_format: str, hidden: int, seed: int) -> None:
    """Half a step of the mantissa, relative; below the smallest normal number, half the smallest step of the scale."""
    x = torch.randn(4, hidden, generator=torch.Generator().manual_seed(seed))
    q, scales = quant.quantize(x, fmt.name, scale_format)
    back = quant.dequantize(q, scales, torch.float32)
    by_channel = (scales if scale_format == "float32" else 2.0 ** (scales.float() - 127)).repeat_interleave(GROUP, 1)
    smallest_step = fmt.decode(1) * by_channel[:, :hidden]
    allowed = torch.maximum(x.abs() * 2.0 ** -(fmt.mantissa_bits + 1), smallest_step / 2)
    assert ((back - x).abs() <= allowed * (1 + 1e-6)).all()


@by_scale
def test_leading_dimensions_and_strides_do_not_matter(scale_format: str) -> None:
    base = torch.randn(200, 3, 2, generator=torch.Generator().manual_seed(1))
    x = base.permute(2, 1, 0)  # [2, 3, 200], channels far apart
    q, scales = quant.quantize(x, "fp8", scale_format)
    assert q.shape == x.shape and scales.shape == (2, 3, 2) and q.is_contiguous() and scales.is_contiguous()
    for i in range(2):
        for j in range(3):
            row_q, row_scales = quant.quantize(x[i, j].contiguous(), "fp8_e4m3", scale_format)
            assert torch.equal(q[i, j].view(torch.uint8), row_q.view(torch.uint8))
            assert torch.equal(scales[i, j], row_scales)
    back = quant.dequantize(q.transpose(0, 1), scales.transpose(0, 1))
    assert back.is_contiguous() and torch.equal(back.transpose(0, 1), quant.dequantize(q, scales))


def test_no_tokens_and_no_gradient() -> None:
    q, scales = quant.quantize(torch.empty(0, 300, dtype=torch.bfloat16))
    assert q.shape == (0, 300) and scales.shape == (0, 3) and quant.dequantize(q, scales).shape == (0, 300)
    q, scales = quant.quantize(torch.ones(1, 4, requires_grad=True))
    assert not q.requires_grad and not scales.requires_grad


def test_tables() -> None:
    assert {name: torch.finfo(dtype).max for name, dtype in quant.FP8_DTYPES.items()} == quant.FP8_MAX
    assert all(quant.FP8_DTYPES[name] == dtype for dtype, name in quant.FP8_FORMATS.items())
    assert [quant.num_scale_groups(hidden) for hidden in (1, 127, 128, 129, 7168)] == [1, 1, 1, 2, 56]
    assert quant.canonical_format("fp8") == "fp8_e4m3" and quant.canonical_format("fp8_e5m2") == "fp8_e5m2"


FP8_ROW = torch.zeros(2, 130).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quant.quantize(torch.zeros(1, 4), "fp4"), ValueError, "fmt is 'fp4', expected one of 'fp8_e4m3'"),
        (lambda: quant.quantize(torch.zeros(1, 4), "fp8", "bf16"), ValueError, "scale_format is 'bf16', expected one"),
        (lambda: quant.quantize(torch.zeros(1, 4).half()), TypeError, "x has dtype torch.float16, expected"),
        (lambda: quant.quantize(torch.zeros(3, 0)), ValueError, r"x has shape \(3, 0\), expected"),
        (lambda: quant.quantize(torch.tensor(1.0)), ValueError, r"x has shape \(\), expected"),
        (lambda: quant.num_scale_groups(0), ValueError, "hidden is 0, expected at least 1"),
        (
            lambda: quant.dequantize(FP8_ROW, torch.ones(2, 1)),
            ValueError,
            r"scales has shape \(2, 1\), expected \(2, 2\)",
        ),
        (
            lambda: quant.dequantize(FP8_ROW, torch.ones(2, 2).int()),
            ValueError,
            r"scales has shape \(2, 2\), expected \(2, 1\)",
        ),
        (lambda: quant.dequantize(FP8_ROW, torch.ones(2, 2).half()), TypeError, "scales has dtype torch.float16"),
        (lambda: quant.dequantize(torch.ones(2, 2), torch.ones(2, 1)), TypeError, "q has dtype torch.float32"),
        (lambda: quant.dequantize(FP8_ROW, torch.ones(2, 2), torch.int8), TypeError, "dtype is torch.int8, expected"),
        (lambda: quant.dequantize(FP8_ROW[:, :0], torch.ones(2, 0)), ValueError, r"q has shape \(2, 0\), expected"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_same_bits_on_a_gpu(fmt: str, scale_format: str) -> None:
    numbers = torch.Generator().manual_seed(3)
    anything = torch.randint(0, 1 << 16, (64, 400), generator=numbers).to(torch.uint16).view(torch.bfloat16)
    usual = torch.randn(64, 400, generator=numbers).bfloat16()
    for x in (anything, usual, anything[:0]):
        codes, scales = quant.quantize(x, fmt, scale_format)
        there_codes, there_scales = quant.quantize(x.cuda(), fmt, scale_format)
        assert torch.equal(there_codes.cpu().view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(there_scales.cpu().view(torch.uint8), scales.view(torch.uint8))
        back = quant.dequantize(codes, scales)
        there_back = quant.dequantize(there_codes, there_scales)
        assert torch.equal(there_back.cpu().view(torch.int16)[back.isfinite()], back.view(torch.int16)[back.isfinite()])
