"""Bad arguments: each names the argument, what came and what was expected, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import device_of, on_backends, on_device_backends, place
from pool import Pool
from small import SMALL, error_of

import deep_a2a

SETTINGS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "hidden of 12": ({"hidden": 12}, "ValueError", ["hidden", "multiple of 8", "12"]),
    "hidden of 0": ({"hidden": 0}, "ValueError", ["hidden", "positive", "0"]),
    "hidden is a float": ({"hidden": 16.0}, "TypeError", ["hidden", "int", "16.0", "float"]),
    "experts not divisible": ({"num_experts": 17}, "ValueError", ["num_experts", "num_ranks = 2", "17"]),
    "no experts": ({"num_experts": 0}, "ValueError", ["num_experts", "positive", "0"]),
    "topk of 0": ({"num_topk": 0}, "ValueError", ["num_topk", "between 1 and 32", "0"]),
    "topk of 33": ({"num_topk": 33, "num_experts": 64}, "ValueError", ["num_topk", "between 1 and 32", "33"]),
    "more topk than experts": ({"num_topk": 17}, "ValueError", ["num_topk", "num_experts = 16", "17"]),
    "no tokens": ({"num_max_tokens_per_rank": 0}, "ValueError", ["num_max_tokens_per_rank", "at least 1", "0"]),
    "ranks per node": ({"ranks_per_node": 3}, "ValueError", ["ranks_per_node", "divide", "2", "3"]),
    "no ranks per node": ({"ranks_per_node": 0}, "ValueError", ["ranks_per_node", "0"]),
    "unknown layout": ({"layout": "token"}, "ValueError", ["layout", "'rank'", "'expert'", "'padded'", "'token'"]),
    "unknown backend": ({"backend": "tpu"}, "ValueError", ["backend", "'cpu'", "'tpu'"]),
    **({} if torch.cuda.is_available() else {"no GPU": ({"backend": "cuda"}, "ValueError", ["backend", "'cuda'"])}),
    "no SMs": ({"backend": "emulated", "num_sms": 0}, "ValueError", ["num_sms", "[1,", "0"]),
    "too many SMs": ({"backend": "emulated", "num_sms": 1000}, "", ["num_sms", "at most", "1000"]),
    "unknown device": ({"backend": "emulated", "device": 99}, "ValueError", ["device", "99"]),
    "unknown stream": (
        {"backend": "emulated", "stream": "mine"},
        "ValueError",
        ["stream", "'own'", "'current'", "mine"],
    ),
    "alignment of 0": ({"layout": "expert", "expert_alignment": 0}, "ValueError", ["expert_alignment", "1", "0"]),
    "alignment beyond 31 bits": (
        {"layout": "expert", "expert_alignment": 1 << 29, "max_recv_rows": 8},
        "ValueError",
        ["expert_alignment", "536870912", "31 bits"],
    ),
    "slots beyond 31 bits": (
        {"num_max_tokens_per_rank": 1 << 30, "max_recv_rows": 8},
        "ValueError",
        ["num_max_tokens_per_rank", "1073741824", "31 bits"],
    ),
    "alignment of rank rows": ({"expert_alignment": 8}, "ValueError", ["expert_alignment", "expert", "8"]),
    "capacity of rank rows": ({"expert_capacity": 8}, "ValueError", ["expert_capacity", "padded", "8"]),
    "capacity of 0": ({"layout": "padded", "expert_capacity": 0}, "ValueError", ["expert_capacity", "1", "0"]),
    "no rows": ({"max_recv_rows": 0}, "ValueError", ["max_recv_rows", "at least 1", "0"]),
    "rows of padded": ({"layout": "padded", "max_recv_rows": 8}, "ValueError", ["max_recv_rows", "padded", "8"]),
    "no slots": ({"num_slots": 0}, "ValueError", ["num_slots", "1", "0"]),
    "no lanes": ({"num_lanes": 0}, "ValueError", ["num_lanes", "1", "0"]),
    "no time": ({"timeout_s": 0}, "ValueError", ["timeout_s", "0"]),
    "time is text": ({"timeout_s": "10"}, "ValueError", ["timeout_s", "'10'"]),
    "negative seed": ({"network_seed": -1}, "ValueError", ["network_seed", "-1"]),
    "more memory than there is": (
        {"num_max_tokens_per_rank": 1 << 24, "hidden": 1 << 14},
        "MemoryError",
        ["recv_rows"],
    ),
}


def construct(group: dist.ProcessGroup) -> dict[str, tuple[str, str]]:
    return {
        name: error_of(partial(deep_a2a.Buffer, group, **{**SMALL, **settings}))
        for name, (settings, _, _) in SETTINGS.items()
    }


@pytest.fixture(scope="module")
def setting_errors(pools: Callable[[int], Pool]) -> list[dict[str, tuple[str, str]]]:
    by_rank: list[dict[str, tuple[str, str]]] = pools(2).run(construct)
    return by_rank


@pytest.mark.parametrize("name", SETTINGS)
def test_setting(setting_errors: list[dict[str, tuple[str, str]]], name: str) -> None:
    _, error, words = SETTINGS[name]
    for errors in setting_errors:
        check_error(errors[name], error, words)


def check_error(got: tuple[str, str], error: str, words: list[str]) -> None:
    assert got[0] != "", "nothing was raised"
    assert error in ("", got[0]), got
    assert all(word in got[1] for word in words), f"{got}: expected to read {words}"


def test_group() -> None:
    """Without a process group, and with something that is none."""
    check_error(error_of(lambda: deep_a2a.Buffer(None, **SMALL)), "ValueError", ["group", "init_process_group"])
    check_error(error_of(lambda: deep_a2a.Buffer("all", **SMALL)), "TypeError", ["group", "ProcessGroup", "str"])


BF16, FP8, IDX, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.float32
X, TOPK, WEIGHTS = torch.zeros(3, 16, dtype=BF16), torch.zeros(3, 2, dtype=IDX), torch.zeros(3, 2)
SCALED = (torch.zeros(3, 16, dtype=FP8), torch.zeros(3, 1))

# name: (arguments of dispatch, error, words of its message)
DISPATCHES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "x is a list": ({"x": [[1.0]]}, "TypeError", ["x", "list"]),
    "x is float32": ({"x": X.float()}, "ValueError", ["x", "bfloat16", "float32"]),
    "x is 1-d": ({"x": X[0]}, "ValueError", ["x", "16", "(16,)"]),
    "x of other hidden": ({"x": X.repeat(1, 2)}, "ValueError", ["x", "16", "(3, 32)"]),
    "x of too many tokens": ({"x": X.repeat(2, 1)}, "ValueError", ["x", "num_max_tokens_per_rank = 4", "6"]),
    "x with strided rows": ({"x": X.repeat(1, 2)[:, ::2]}, "ValueError", ["x", "contiguous", "(32, 2)"]),
    "x is FP8 without scales": ({"x": SCALED[0]}, "ValueError", ["x", "or a pair (fp8, scales)", "float8_e4m3fn"]),
    "x is one of a pair": ({"x": (X,)}, "TypeError", ["x", "(fp8, scales)", "1"]),
    "x is a BF16 pair": ({"x": (X, SCALED[1])}, "ValueError", ["x[0]", "float8_e4m3fn", "bfloat16"]),
    "scales of other shape": ({"x": (SCALED[0], torch.zeros(3, 2))}, "ValueError", ["scales", "[3, 1]", "(3, 2)"]),
    "scales are int32": ({"x": (SCALED[0], SCALED[1].int())}, "ValueError", ["scales", "float32", "int32"]),
    "FP8 and quantize": ({"x": SCALED, "quantize": "fp8"}, "ValueError", ["quantize", "None", "'fp8'"]),
    "unknown quantize": ({"quantize": "int8"}, "ValueError", ["quantize", "'fp8'", "'int8'"]),
    "unknown scale format": (
        {"quantize": "fp8", "scale_format": "f16"},
        "ValueError",
        ["scale_format", "ue8m0", "'f16'"],
    ),
    "unknown scale layout": (
        {"quantize": "fp8", "scale_layout": "columns"},
        "ValueError",
        ["scale_layout", "'row_major'", "'column_major'", "'columns'"],
    ),
    "scale layout is none": (
        {"x": SCALED, "scale_layout": None},
        "ValueError",
        ["scale_layout", "'row_major'", "None"],
    ),
    "columns of BF16": (
        {"scale_layout": "column_major"},
        "ValueError",
        ["scale_layout", "'row_major'", "bfloat16", "quantize", "'column_major'"],
    ),
    "unknown output": ({"output": "mine"}, "ValueError", ["output", "'leased'", "'owned'", "'mine'"]),
    "no topk_idx": ({"topk_idx": None}, "ValueError", ["topk_idx", "handle"]),
    "topk_idx is float": ({"topk_idx": TOPK.float()}, "ValueError", ["topk_idx", "int64", "float32"]),
    "topk_idx of other top-k": ({"topk_idx": TOPK[:, :1]}, "ValueError", ["topk_idx", "[3, 2]", "(3, 1)"]),
    "topk_idx of other tokens": ({"topk_idx": TOPK[:2]}, "ValueError", ["topk_idx", "[3, 2]", "(2, 2)"]),
    "topk_idx with strides": ({"topk_idx": TOPK.T.contiguous().T}, "ValueError", ["topk_idx", "contiguous", "(1, 3)"]),
    "weights are float64": ({"topk_weights": WEIGHTS.double()}, "ValueError", ["topk_weights", "float32", "float64"]),
    "weights of other shape": ({"topk_weights": WEIGHTS[:1]}, "ValueError", ["topk_weights", "[3, 2]", "(1, 2)"]),
    "lane too high": ({"lane": 2}, "ValueError", ["lane", "[0, 2)", "2"]),
    "lane is negative": ({"lane": -1}, "ValueError", ["lane", "[0, 2)", "-1"]),
    "lane is text": ({"lane": "0"}, "ValueError", ["lane", "[0, 2)", "'0'"]),
}


def moved(value: Any, device: torch.device) -> Any:
    """With its tensors on the device, laid out as they were."""
    if isinstance(value, tuple):
        return tuple(moved(each, device) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def dispatch_badly(group: dist.ProcessGroup, backend: str) -> dict[str, tuple[str, str]]:
    errors, device = {}, device_of(backend)
    good: dict[str, Any] = {"x": X.to(device), "topk_idx": TOPK.to(device)}
    with deep_a2a.Buffer(group, **place(backend), **SMALL) as buffer:
        for name, (arguments, _, _) in DISPATCHES.items():
            bad = {key: moved(value, device) for key, value in arguments.items()}
            errors[name] = error_of(partial(buffer.dispatch, **{**good, **bad}))
        buffer.dispatch(**good).release()  # nothing of all that has been sent
    return errors


@on_backends
def test_dispatch(pools: Callable[[int], Pool], backend: str) -> None:
    errors: dict[str, tuple[str, str]] = pools(1).run(dispatch_badly, backend)[0]
    for name, got in errors.items():
        check_error((got[0], f"{name}: {got[1]}"), *DISPATCHES[name][1:])


def dispatch_elsewhere(group: dist.ProcessGroup, backend: str) -> list[tuple[str, str]]:
    """Each argument in turn on a device that is not the buffer's."""
    device = device_of(backend)
    other = "meta" if backend == "emulated" else "cpu"
    good: dict[str, Any] = {"x": X.to(device), "topk_idx": TOPK.to(device), "topk_weights": WEIGHTS.to(device)}
    with deep_a2a.Buffer(group, **place(backend), **SMALL) as buffer:
        result = buffer.dispatch(**good)
        errors = [error_of(partial(buffer.dispatch, **{**good, name: good[name].to(other)})) for name in good]
        errors.append(error_of(lambda: buffer.combine(torch.zeros(3, 16, dtype=BF16, device=other), result.handle)))
        result.release()
    return errors


@on_device_backends
def test_arrays_elsewhere(pools: Callable[[int], Pool], backend: str) -> None:
    errors: list[tuple[str, str]] = pools(1).run(dispatch_elsewhere, backend)[0]
    wanted = "CPU tensor" if backend == "emulated" else "cuda"
    for got, name in zip(errors, ["x", "topk_idx", "topk_weights", "x"], strict=True):
        check_error(got, "ValueError", [name, wanted, "meta" if backend == "emulated" else "cpu"])


def use_badly(group: dist.ProcessGroup, backend: str) -> dict[str, tuple[str, str, list[str]]]:
    """What needs a handle, a pending half or a destroyed buffer: (error, message, words that it has to have)."""
    found: dict[str, tuple[str, str, list[str]]] = {}

    def expect(name: str, call: Callable[[], Any], words: str) -> None:
        found[name] = (*error_of(call), words.split())

    device, at = device_of(backend), place(backend)
    x, topk, y = X.to(device), TOPK.to(device), torch.zeros(3, 16, dtype=BF16, device=device)
    settings = {**SMALL, **at}
    with deep_a2a.Buffer(group, **settings) as buffer, deep_a2a.Buffer(group, layout="expert", **settings) as other:
        result, foreign = buffer.dispatch(x, topk), other.dispatch(x, topk)
        handle = result.handle
        wrong: Any = "h"
        both: dict[str, Any] = {"topk_idx": topk, "handle": handle}
        expect("ValueError handle and idx", lambda: buffer.dispatch(x, **both), "topk_idx handle")
        expect("ValueError other tokens", lambda: buffer.dispatch(x[:1], handle=handle), "x 3 1")
        expect("ValueError foreign handle", lambda: buffer.dispatch(x, handle=foreign.handle), "handle")
        expect("TypeError no handle", lambda: buffer.dispatch(x, handle=wrong), "handle DispatchHandle str")
        expect("ValueError rows", lambda: buffer.combine(y[:2], handle), "x [3, 16] (2, 16)")
        expect("ValueError dtype", lambda: buffer.combine(y.float(), handle), "x bfloat16 float32")
        expect("ValueError strides", lambda: buffer.combine(y.T.contiguous().T, handle), "x contiguous (1, 3)")
        expect("ValueError weighted", lambda: buffer.combine(y, handle, weighted=True), "weighted None False True")
        side = torch.zeros(3, 2, device=device)
        expect("ValueError side", lambda: buffer.combine(y, handle, side=side[:2]), "side [3, 2] (2, 2)")
        expect("ValueError side dtype", lambda: buffer.combine(y, handle, side=side.double()), "side float32 float64")
        expect("ValueError combine lane", lambda: buffer.combine(y, handle, lane=7), "lane [0, 2) 7")
        expect("ValueError their handle", lambda: buffer.combine(y, foreign.handle), "handle")
        wrong_too: Any = result
        expect("TypeError a result", lambda: buffer.combine(y, wrong_too), "handle DispatchHandle DispatchResult")
        expect("ValueError lend", lambda: buffer.lend_input(5), "num_tokens [0, 4] 5")
        expect("ValueError lend dtype", lambda: buffer.lend_input(1, torch.float32), "dtype float32")
        expect("ValueError lend layout", lambda: other.lend_expert_output(foreign), "lend_expert_output rank expert")
        pending = buffer.dispatch_send(x, topk)
        expect("RuntimeError half open", lambda: buffer.dispatch(x, topk), "lane 0 recv")
        expect("RuntimeError combine half", lambda: buffer.combine(y, handle), "lane 0 recv")
        pending.recv().release()
        expect("RuntimeError twice", pending.recv, "recv twice")
        buffer.combine(y, handle)
    result.release()
    foreign.release()
    expect("RuntimeError destroyed", lambda: buffer.dispatch(x, topk), "destroyed")
    expect("RuntimeError gone", lambda: buffer.combine(y, handle), "destroyed")
    expect("RuntimeError check", buffer.check, "destroyed")
    buffer.destroy()
    with deep_a2a.Buffer(group, **{**settings, "hidden": 8}) as narrow:
        short = torch.zeros(1, 8, dtype=BF16, device=device)
        expect("ValueError FP8 of 8", lambda: narrow.dispatch(short, topk[:1], quantize="fp8"), "16 FP8 8")
    return found


@on_backends
def test_use(pools: Callable[[int], Pool], backend: str) -> None:
    for name, (error, text, words) in pools(1).run(use_badly, backend)[0].items():
        expected, what = name.split(maxsplit=1)
        check_error((error, f"{what}: {text}"), expected, words)
