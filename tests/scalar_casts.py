"""The formulas of the FP8 cast in Python's own numbers: one value at a time, no torch."""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


def to_float32(value: float) -> float:
    """Round to the nearest float32. One operation in double and then this is one float32 operation."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class Format:
    """A format by its definition: a sign, an exponent, a mantissa. The list index of a value is its code."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest_code: int

    def decode(self, code: int) -> float:
        sign = -1.0 if code & 0x80 else 1.0
        code &= 0x7F
        if code > self.largest_code:
            # E4M3 has no infinity: both of its codes beyond the largest are one, the NaN. E5M2 is like IEEE formats.
            return sign * math.inf if self.mantissa_bits == 2 and code == 0x7C else math.nan
        bias = 2 ** (self.exponent_bits - 1) - 1
        exponent, mantissa = code >> self.mantissa_bits, code & (2**self.mantissa_bits - 1)
        if exponent == 0:
            return sign * math.ldexp(mantissa, 1 - bias - self.mantissa_bits)
        return sign * math.ldexp(2**self.mantissa_bits + mantissa, exponent - bias - self.mantissa_bits)

    @property
    def largest(self) -> float:
        return self.decode(self.largest_code)


E4M3 = Format("fp8_e4m3", 4, 3, 0x7E)
E5M2 = Format("fp8_e5m2", 5, 2, 0x7B)
FORMATS = [E4M3, E5M2]
MAGNITUDES = {fmt.name: [fmt.decode(code) for code in range(fmt.largest_code + 1)] for fmt in FORMATS}


def round_to_code(value: float, fmt: Format) -> int:
    if math.isnan(value):
        return 0x7F
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    magnitude, values = abs(value), MAGNITUDES[fmt.name]
    if magnitude >= values[-1]:
        return sign | fmt.largest_code
    low = bisect_right(values, magnitude) - 1
    twice, middle = 2 * magnitude, values[low] + values[low + 1]
    goes_up = twice > middle or (twice == middle and low % 2 == 1)
    return sign | (low + goes_up)


def cast_group(group: Sequence[float], fmt: Format, scale_format: str) -> tuple[list[int], float]:
    """Codes, and the scale as a number."""
    amax = max([2.0**-96, *(abs(value) for value in group if not math.isnan(value))])
    ratio = to_float32(amax / fmt.largest)
    if scale_format == "float32":
        inverse = to_float32(fmt.largest / amax)
        return [round_to_code(to_float32(value * inverse), fmt) for value in group], ratio
    exponent = 127
    if math.isfinite(ratio):
        fraction, exponent = math.frexp(ratio)  # ratio = fraction * 2^exponent, 0.5 <= fraction < 1
        exponent -= fraction == 0.5
    scale = 2.0**exponent
    return [round_to_code(to_float32(value / scale), fmt) for value in group], scale
