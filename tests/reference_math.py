"""The oracle's arithmetic, in plain torch: BF16 rounding, a correctly rounded fma, the FP8 cast."""

from __future__ import annotations

import torch

FP8_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
FP8_LARGEST = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
GROUP_CHANNELS = 128


def to_bf16(value: torch.Tensor) -> torch.Tensor:
    """FP32 to BF16, to nearest even; NaN becomes 0x7FFF."""
    bits = value.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = torch.where(value.isnan(), 0x7FFF, rounded)
    return rounded.to(torch.uint16).view(torch.bfloat16)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of FP32 values, rounded once.

    The product is exact in FP64. The sum is rounded to odd there (if it was inexact and came out even, it is moved to
    its neighbour on the side of the error), and then to FP32: with at least two spare bits this equals one rounding
    ("Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions on
    Computers 57 (4), 2008). The error of the sum comes from the error-free transformation TwoSum.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    even = (total.view(torch.int64) & 1) == 0
    target = torch.where(error > 0, torch.inf, -torch.inf).double()
    odd = torch.where(even & error.isfinite() & (error != 0), torch.nextafter(total, target), total)
    return odd.float()


def quantize(x: torch.Tensor, fmt: str, scale_format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The FP8 cast of BF16 or FP32 rows [tokens, hidden]: values, and scales [tokens, groups] (FP32 or UE8M0)."""
    largest = torch.tensor(FP8_LARGEST[fmt])  # a tensor: torch divides a number by a tensor with two roundings
    num_groups = -(-x.shape[1] // GROUP_CHANNELS)
    groups = torch.zeros(len(x), num_groups * GROUP_CHANNELS)
    groups[:, : x.shape[1]] = x.float()
    groups = groups.reshape(len(x), num_groups, GROUP_CHANNELS)
    amax = torch.where(groups.isnan(), 0.0, groups).abs().amax(-1).clamp(min=2.0**-96)
    if scale_format == "float32":
        scales = amax / largest
        scaled = groups * (largest / amax)[..., None]
    else:
        bits = (amax / largest).view(torch.int32)
        exponent = ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).clamp(max=254)
        scales = exponent.to(torch.uint8)
        scaled = groups / (exponent << 23).int().view(torch.float32)[..., None]
    values = scaled.clamp(-FP8_LARGEST[fmt], FP8_LARGEST[fmt]).to(FP8_DTYPES[fmt]).view(torch.uint8)
    values = torch.where(scaled.isnan(), torch.tensor(0x7F, dtype=torch.uint8), values)
    values = values.flatten(1)[:, : x.shape[1]].contiguous().view(FP8_DTYPES[fmt])
    return values, scales
