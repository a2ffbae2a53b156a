"""The MoE layer against one of a single process, written here in plain torch: within what BF16 and FP8 round away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import device_of, on_device_backends, on_usual_nodes
from moe_buffers import BUFFERS, HIDDEN, LOCAL_EXPERTS, NUM_TOPK, TOKENS, make_buffer, num_ranks, poison, sizes
from pool import Pool
from torch import Tensor, nn

from deep_a2a import moe
from deep_a2a.routing import Router

INTERMEDIATE = 48
SEED = 3


class PlainMoE(nn.Module):
    """All experts in one process, one token and one expert at a time, in float64."""

    def __init__(self, parameters: dict[str, Tensor], router: Router) -> None:
        super().__init__()
        self.router = router
        self.weights = nn.ParameterDict({name.replace(".", "_"): p.double() for name, p in parameters.items()})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the outputs and the load of the experts."""
        scores = (x @ self.weights["gate_weight"].T).sigmoid()
        load = torch.zeros(self.router.num_experts, dtype=torch.int64)
        outputs = []
        for token, score in zip(x, scores, strict=True):
            chosen = self.choose(score)
            load[chosen] += 1
            y = self.expert(token, self.weights["shared_w_in"], self.weights["shared_w_out"])
            for expert in chosen:
                weight = score[expert] / score[chosen].sum() * self.router.scaling_factor
                w_in, w_out = self.weights["experts_w_in"][expert], self.weights["experts_w_out"][expert]
                y = y + weight * self.expert(token, w_in, w_out)
            outputs.append(y)
        return torch.stack(outputs), load

    def choose(self, score: Tensor) -> list[int]:
        size = self.router.num_experts // self.router.num_groups
        groups = sorted(range(0, len(score), size), key=lambda first: -score[first : first + size].topk(2).values.sum())
        allowed = [first + i for first in groups[: self.router.topk_groups] for i in range(size)]
        return sorted(allowed, key=lambda expert: -score[expert])[: self.router.num_topk]

    @staticmethod
    def expert(token: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        half = len(w_in) // 2
        gate, up = w_in[:half] @ token, w_in[half:] @ token
        return w_out @ (gate * gate.sigmoid() * up)


@dataclass(frozen=True)
class LayerRun:
    """What a rank saw of one forward and backward pass."""

    y: Tensor
    grad_x: Tensor
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    load: Tensor
    bias: Tensor


def layer_inputs(rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and the gradient of their outputs."""
    numbers = torch.Generator().manual_seed(1000 + rank)
    shape = (TOKENS[rank], HIDDEN)
    return torch.randn(shape, generator=numbers), torch.randn(shape, generator=numbers)


def layer_router(topology: str) -> Router:
    num_nodes, ranks_per_node = sizes(topology)
    num_experts = num_nodes * ranks_per_node * LOCAL_EXPERTS
    return Router(num_experts, NUM_TOPK, num_groups=num_nodes, topk_groups=max(1, num_nodes // 2))


def run_layer(group: dist.ProcessGroup, backend: str, topology: str, layout: str, options: dict[str, Any]) -> LayerRun:
    torch.manual_seed(7)  # the gate's weights, equal on all ranks
    device = device_of(backend)
    with make_buffer(group, backend, topology, layout) as buffer:
        layer = moe.MoELayer(buffer, layer_router(topology), INTERMEDIATE, shared_intermediate=32, seed=SEED, **options)
        layer.to(device)
        x, grad = (each.to(device) for each in layer_inputs(buffer.rank))
        x.requires_grad_()
        layer.eval()
        with torch.no_grad():
            layer(x)
        layer.train()
        poison(buffer)
        y = layer(x)
        poison(buffer)
        y.backward(grad)
        for parameter in moe.split_parameters(layer).shared:
            assert parameter.grad is not None
            summed = parameter.grad.cpu()
            dist.all_reduce(summed, group=group)
            parameter.grad.copy_(summed)
        load = layer.update_bias(0.5)
        assert x.grad is not None and not layer.expert_load.any()
        return LayerRun(
            y.detach().cpu(),
            x.grad.cpu(),
            {name: p.detach().cpu() for name, p in layer.named_parameters()},
            {name: p.grad.cpu() for name, p in layer.named_parameters() if p.grad is not None},
            load.cpu(),
            layer.gate.expert_bias.cpu(),
        )


def whole(by_rank: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of one model: those of the experts put together, the others, equal on all ranks, once."""
    tensors = {}
    for name, first in by_rank[0].items():
        every = [tensors[name] for tensors in by_rank]
        if not name.startswith("experts."):
            assert all(torch.equal(first, other) for other in every), name
        tensors[name] = torch.cat(every) if name.startswith("experts.") else first
    return tensors


def check_layer(runs: list[LayerRun], topology: str, tolerance: float) -> None:
    inputs = [layer_inputs(rank) for rank in range(len(runs))]
    plain = PlainMoE(whole([run.parameters for run in runs]), layer_router(topology))
    x = torch.cat([x for x, _ in inputs]).double().requires_grad_()
    y, load = plain(x)
    y.backward(torch.cat([grad for _, grad in inputs]).double())

    got = {"y": torch.cat([run.y for run in runs]), "x": torch.cat([run.grad_x for run in runs])}
    expected = {"y": y.detach(), "x": x.grad}
    for name, gradient in whole([run.gradients for run in runs]).items():
        got[name], expected[name] = gradient, plain.weights[name.replace(".", "_")].grad
    errors = {}
    for name, value in expected.items():
        assert value is not None
        errors[name] = ((got[name].double() - value).norm() / value.norm()).item()
    assert all(error < tolerance for error in errors.values()), errors

    for run in runs:
        assert torch.equal(run.load, load)
        assert torch.equal(run.bias, 0.5 * (load.double().mean() - load).sign().float())


# Half a unit in the last place is up to 2^-8 of a BF16 value, 0.16 % in the mean square. A row is rounded two to four
# times on its way to the experts and back, and so is its gradient: 0.35 % here at most.
BF16_TOLERANCE = 0.007
# The same of E4M3 is up to 2^-4, 2.6 % in the mean square, and of E5M2 twice that. Errors of rows and of gradients
# add up in the weights' gradients: 3.9 % and 6.4 % here.
FP8_TOLERANCES = {"bf16": 0.06, "fp8_e5m2": 0.1}


@pytest.mark.parametrize("layout", BUFFERS)
@pytest.mark.parametrize("topology", ["1x1", "2x4", "4x2", "2x3"])
def test_layer_bf16(pools: Callable[[int], Pool], topology: str, layout: str) -> None:
    runs = pools(num_ranks(topology)).run(run_layer, "cpu", topology, layout, {})
    check_layer(runs, topology, BF16_TOLERANCE)


@on_device_backends
@pytest.mark.parametrize("layout", BUFFERS)
@pytest.mark.parametrize("topology", ["1x1", "1x3", "1x4"])
def test_layer_bf16_on_devices(pools: Callable[[int], Pool], backend: str, topology: str, layout: str) -> None:
    runs = pools(num_ranks(topology)).run(run_layer, backend, topology, layout, {})
    check_layer(runs, topology, BF16_TOLERANCE)


@on_usual_nodes
@pytest.mark.parametrize("layout", BUFFERS)
def test_layer_with_bf16_products(pools: Callable[[int], Pool], backend: str, topology: str, layout: str) -> None:
    runs = pools(num_ranks(topology)).run(run_layer, backend, topology, layout, {"compute_dtype": torch.bfloat16})
    check_layer(runs, topology, 2 * BF16_TOLERANCE)


@on_usual_nodes
@pytest.mark.parametrize("gradients", FP8_TOLERANCES)
@pytest.mark.parametrize("layout", BUFFERS)
def test_layer_fp8(pools: Callable[[int], Pool], backend: str, topology: str, layout: str, gradients: str) -> None:
    grad_format = moe.BF16 if gradients == "bf16" else moe.RowFormat(gradients)
    options = {"row_format": "fp8_e4m3", "grad_format": grad_format, "lane": 1}
    runs = pools(num_ranks(topology)).run(run_layer, backend, topology, layout, options)
    check_layer(runs, topology, FP8_TOLERANCES[gradients])


# ---- parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["1x1", "2x4"])
def test_experts_start_equal_on_any_number_of_ranks(pools: Callable[[int], Pool], topology: str) -> None:
    runs = pools(num_ranks(topology)).run(run_layer, "cpu", topology, "rank", {})
    started = whole([run.parameters for run in runs])["experts.w_in"]
    one_by_one = [
        moe.RoutedExperts(HIDDEN, INTERMEDIATE, first_expert=expert, num_experts=1, seed=SEED).w_in[0]
        for expert in range(len(started))
    ]
    assert torch.equal(started, torch.stack(one_by_one))
    other_seed = moe.RoutedExperts(HIDDEN, INTERMEDIATE, first_expert=0, num_experts=1, seed=SEED + 1).w_in[0]
    assert all(not torch.equal(w_in, other) for w_in in one_by_one[1:] for other in (one_by_one[0], other_seed))


def split_and_misfit(group: dist.ProcessGroup) -> tuple[list[str], list[str], list[str]]:
    """Names of the replicated parameters and of the experts', and errors: of a router that does not fit, of formats."""
    with make_buffer(group, "cpu", "1x1", "rank") as buffer:
        layer = moe.MoELayer(buffer, layer_router("1x1"), INTERMEDIATE, shared_intermediate=32)
        model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), layer)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        split = moe.split_parameters(model)
        misfits: list[tuple[Router, dict[str, Any]]] = [
            (Router(12, 4, num_groups=1, topk_groups=1), {}),
            (layer_router("1x1"), {"row_format": "fp9"}),
            (layer_router("1x1"), {"grad_format": torch.float8_e5m2}),
        ]
        errors = []
        for router, options in misfits:
            with pytest.raises((TypeError, ValueError)) as error:
                moe.MoELayer(buffer, router, INTERMEDIATE, **options)
            errors.append(str(error.value))
        return [names[id(p)] for p in split.shared], [names[id(p)] for p in split.expert], errors


def test_split_and_misfit(pools: Callable[[int], Pool]) -> None:
    [(shared, expert, errors)] = pools(1).run(split_and_misfit)
    assert shared == ["0.weight", "0.bias", "1.gate.weight", "1.shared.w_in", "1.shared.w_out"]
    assert expert == ["1.experts.w_in", "1.experts.w_out"]
    assert errors == [
        "router.num_experts is 12, expected the buffer's 4",
        "row_format: quantize must be None, 'fp8', 'fp8_e4m3' or 'fp8_e5m2', got 'fp9' of type str",
        "grad_format must be a RowFormat or the name of an FP8 format, got an object of type dtype",
    ]
