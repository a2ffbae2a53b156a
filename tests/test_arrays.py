"""Arrays of NumPy and CuPy: the same bits as with torch tensors, and torch itself is not needed for them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import data
import pytest
import torch
import torch.distributed as dist
from backends import device_of, on_backends
from exchange import COUNT_FIELDS, RANK_ROW_FIELDS, ROW_FIELDS
from generators import LAYOUTS, case_on
from pool import Pool

import deep_a2a

LIBRARIES = [("cpu", "numpy"), ("emulated", "numpy"), pytest.param("cuda", "cupy", marks=pytest.mark.gpu)]
STAND_INS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}


def bits(array: Any) -> Any:
    """A NumPy array of a tensor, or of an array of any library, with dtypes that NumPy has."""
    if isinstance(array, torch.Tensor):
        return array.cpu().view(STAND_INS.get(array.dtype, array.dtype)).numpy()
    return array.get() if hasattr(array, "get") else array


def same(name: str, theirs: Any, ours: Any) -> None:
    if theirs is None or ours is None:
        assert theirs is ours, name
        return
    got, want = bits(theirs), bits(ours)
    assert (got.shape, got.dtype, got.tobytes()) == (want.shape, want.dtype, want.tobytes()), name


def use_library(group: dist.ProcessGroup, backend: str, library: str, layout: str) -> None:
    """A dispatch and a combine with torch, then with the library, in one buffer."""
    device, module = device_of(backend), importlib.import_module(library)
    if library == "cupy":
        module.cuda.Device(device.index).use()
    case = case_on(backend, topology="1x2", layout=layout, tokens=(5, 8))
    mine = data.inputs(case, dist.get_rank(group))
    names = [name for name in (*ROW_FIELDS, *RANK_ROW_FIELDS, *COUNT_FIELDS) if name != "row_weights"]
    with deep_a2a.Buffer(group, **case.buffer_arguments()) as buffer:
        by_column = {"quantize": "fp8", "scale_format": "ue8m0", "scale_layout": "column_major"}
        for modes in (
            {},
            {"quantize": "fp8"},
            by_column,
            {"output": "owned"},
            {"host_sync": False, "output": "owned"},
        ):
            options: dict[str, Any] = {"zero_padding": True, **modes}
            given = [mine.x, mine.topk_idx, mine.topk_weights]
            ours = buffer.dispatch(*(each.to(device) for each in given), **options)
            theirs = buffer.dispatch(*(module.asarray(bits(each)) for each in given), **options)
            assert type(theirs.x).__module__.split(".")[0] == library
            count = None if options.get("host_sync", True) or layout == "padded" else int(ours.num_rows_tensor[0])
            for name in names:
                mine_of, theirs_of = getattr(ours, name), getattr(theirs, name)
                cut = slice(count if name in ROW_FIELDS else None)
                same(name, *(None if each is None else each[cut] for each in (theirs_of, mine_of)))
            if ours.row_weights is not None:
                same("row_weights", theirs.row_weights, ours.row_weights)
            rows = torch.randn(ours.x.shape, generator=data.generator(buffer.rank, 6)).bfloat16()
            sums = buffer.combine(rows.to(device), ours.handle)
            same("combined x", buffer.combine(module.asarray(bits(rows)), theirs.handle).x, sums.x)
            ours.release()
            theirs.release()


@pytest.mark.parametrize(("backend", "library"), LIBRARIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_as_torch(pools: Callable[[int], Pool], backend: str, library: str, layout: str) -> None:
    pytest.importorskip(library)
    pools(2).run(use_library, backend, library, layout)


class SpeaksDlpack:
    """An array that is nothing but its memory, by DLPack."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._array.__dlpack_device__()
        return device


class SpeaksInterface:
    """The same by the CUDA array interface, which knows neither BF16 nor FP8."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__


def use_protocols(group: dist.ProcessGroup, backend: str) -> None:
    """Torch is there, so it takes what is given, and results are its tensors."""
    device = device_of(backend)
    case = case_on(backend, topology="1x2", layout="rank", tokens=(5, 8))
    mine = data.inputs(case, dist.get_rank(group))
    given = [each.to(device) for each in (mine.x, mine.topk_idx, mine.topk_weights)]
    kinds: list[Any] = [SpeaksDlpack, *[SpeaksInterface if backend == "cuda" else SpeaksDlpack] * 2]
    rows: Any = SpeaksDlpack
    with deep_a2a.Buffer(group, **case.buffer_arguments()) as buffer:
        ours = buffer.dispatch(*given)
        theirs = buffer.dispatch(*(kind(each) for kind, each in zip(kinds, given, strict=True)))
        for name in (*ROW_FIELDS, *RANK_ROW_FIELDS, *COUNT_FIELDS):
            same(name, getattr(theirs, name), getattr(ours, name))
        sums = buffer.combine(ours.x, ours.handle)
        same("combined x", buffer.combine(rows(ours.x), theirs.handle).x, sums.x)


@on_backends
def test_protocols(pools: Callable[[int], Pool], backend: str) -> None:
    pools(2).run(use_protocols, backend)


WITHOUT_TORCH = """
import sys
import {library} as array
import deep_a2a

class Alone:
    rank, size = 0, 1

    def all_gather_bytes(self, message, timeout_s):
        return [message]

sizes = {{"hidden": 16, "num_experts": 4, "num_topk": 2, "num_max_tokens_per_rank": 4}}
with deep_a2a.Buffer(Alone(), backend="{backend}", num_sms=2, **sizes) as buffer:
    x = array.arange(48, dtype="uint16").reshape(3, 16)
    result = buffer.dispatch(x, array.asarray([[0, -1], [1, 2], [3, 0]]))
    assert (result.x == x).all()
    assert (buffer.combine(result.x, result.handle).x == x).all()
    result.release()
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(("backend", "library"), LIBRARIES)
def test_torch_is_not_imported(backend: str, library: str) -> None:
    pytest.importorskip(library)
    code = WITHOUT_TORCH.format(backend=backend, library=library)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
