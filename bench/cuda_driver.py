"""Calls of the CUDA driver that torch does not have."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from typing import Any


def call(function: str, *arguments: Any, accept: Collection[int] = (), of: str = "") -> None:
    """RuntimeError where the driver has no such function, or returns an error that is not in `accept`.

    of: what the message says of the arguments.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    if not hasattr(driver, function):
        raise RuntimeError(f"the CUDA driver has no {function}: it is too old")
    code = getattr(driver, function)(*arguments)
    if code != 0 and code not in accept:
        raise RuntimeError(f"{function}{of and ' of '}{of} failed with error {code} of the CUDA driver")


def ordinal_of(device: int) -> ctypes.c_int:
    ordinal = ctypes.c_int()
    call("cuDeviceGet", ctypes.byref(ordinal), device, of=f"device {device}")
    return ordinal
