"""Memory of the own window, lent to the caller to write inputs into."""

from __future__ import annotations

from typing import Any

from deep_a2a.arrays import Library, default_library, library_named, library_of
from deep_a2a.backend import Backend
from deep_a2a.formats import FP8_NAMES
from deep_a2a.numpy_arrays import STAND_INS, NumpyLibrary
from deep_a2a.results import DispatchHandle, DispatchResult

_DTYPES = ("bfloat16", *FP8_NAMES.values())


def lend_input(backend: Backend, num_tokens: int, hidden: int, dtype: Any, lane: int) -> Any:
    """[num_tokens, hidden] of the lane's input rows; `dtype` also says of which library."""
    library, name = _choose(backend, dtype)
    return backend.view(library, "input_rows", lane, num_tokens, hidden, name)


def lend_rows(backend: Backend, handle: DispatchHandle | DispatchResult, num_rows: int, hidden: int, lane: int) -> Any:
    """bfloat16 [num_rows, hidden] of what the lane's combine reads; of the library of the result, if one is given."""
    library = library_of(handle.x) if isinstance(handle, DispatchResult) else None
    library = library or default_library(backend.device)
    return backend.view(library, "combine_rows", lane, num_rows, hidden, "bfloat16")


def _choose(backend: Backend, dtype: Any) -> tuple[Library, str]:
    """The library that `dtype` is of, and the dtype's name."""
    if dtype is None:
        return default_library(backend.device), "bfloat16"
    if type(dtype).__module__.partition(".")[0] == "torch":
        library: Library = library_named("torch")
        name = library.dtype_name(dtype)
    else:
        library = library_named("cupy" if backend.device.kind == "cuda" else "numpy")
        name = library.dtype_name(dtype)
        if name in STAND_INS:
            library = NumpyLibrary.shared(library.name, foreign=True)
        name = next((meant for meant, stand_in in STAND_INS.items() if stand_in == name), name)
    if name not in _DTYPES:
        raise ValueError(f"dtype must be bfloat16 or an FP8 (float8_e4m3fn, float8_e5m2), got {dtype}")
    return library, name
