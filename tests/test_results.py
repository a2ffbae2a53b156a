"""Results and errors show shapes, never tensors; and what each field is, `help` says."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import pytest
import torch

import deep_a2a
from deep_a2a.payload import describe

SECRET = 12345.0  # in every tensor: must not be read


def make_result() -> deep_a2a.DispatchResult:
    def full(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, SECRET, dtype=dtype)

    return deep_a2a.DispatchResult(
        x=full(5, 16, dtype=torch.bfloat16),
        scales=None,
        topk_idx=full(3, 2),
        topk_weights=full(3, 2, dtype=torch.float32),
        expert_rows=full(3, 2),
        rows_per_expert=full(4),
        expert_offsets=full(5),
        rows_per_rank=full(2),
        expert_load=full(8),
        num_rows_tensor=full(2),
        num_rows=5,
        num_rank_rows=3,
        handle=deep_a2a.DispatchHandle(7, 5, 3, False, 1, owner=full(99), call=cast(Any, full(99))),
        event=None,
        lease=None,
    )


def test_repr_of_results() -> None:
    shown = repr(make_result())
    assert shown.startswith("DispatchResult(x=bfloat16 [5, 16], scales=None, topk_idx=int32 [3, 2], ")
    assert "num_rows=5, num_rank_rows=3, handle=DispatchHandle(num_tokens=7, num_rows=5, " in shown
    combined = deep_a2a.CombineResult(torch.full((7, 16), SECRET), None, None)
    assert repr(combined) == "CombineResult(x=float32 [7, 16], side=None, event=None)"
    assert "12345" not in shown and "123" not in repr(combined)


@pytest.mark.parametrize("kind", [deep_a2a.DispatchResult, deep_a2a.DispatchHandle, deep_a2a.CombineResult])
def test_help_has_every_field(kind: type) -> None:
    attributes = (kind.__doc__ or "").partition("Attributes:")[2]
    named = {name for line in attributes.splitlines() for name in line.partition(":")[0].replace(",", " ").split()}
    assert {field.name for field in fields(kind)} <= named


class Holder:
    def __repr__(self) -> str:
        raise AssertionError("must not be printed")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        (3, "3 of type int"),
        ("fp9", "'fp9' of type str"),
        (True, "True of type bool"),
        (torch.zeros(2, 3), "a torch.float32 tensor of shape (2, 3) on cpu"),
        ((torch.zeros(2), None), "a tuple of (a torch.float32 tensor of shape (2,) on cpu, None)"),
        (Holder(), "an object of type Holder"),
        ([torch.zeros(2)], "an object of type list"),
        ({"x": torch.zeros(2)}, "an object of type dict"),
    ],
)
def test_describe(value: Any, shown: str) -> None:
    assert describe(value) == shown


def test_exceptions_are_exported() -> None:
    for name in ("CommTimeoutError", "PeerAbortError", "CapacityError", "MismatchError", "LeaseError"):
        assert name in deep_a2a.__all__
        assert issubclass(getattr(deep_a2a, name), deep_a2a.CommError)
        assert getattr(deep_a2a, name) is getattr(deep_a2a.errors, name)
