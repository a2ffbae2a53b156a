"""The training loop: the same for a rank of many and for one process that has all experts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from deep_a2a import Buffer
from deep_a2a.demo.config import PAYLOADS, DemoConfig
from deep_a2a.demo.corpus import Corpus
from deep_a2a.demo.dense import DenseMoE
from deep_a2a.demo.model import ByteModel
from deep_a2a.moe import MoELayer, RowFormat, split_parameters
from deep_a2a.routing import load_balance

_WARMUP_STEPS = 10
_FINAL_RATE = 0.1


@dataclass
class History:
    """What a run measured; equal on all ranks except for the seconds.

    train_loss, balance: one value per step: nats per byte; load of the busiest expert over the mean, mean over layers.
    validation_loss: step -> nats per byte on held-out files.
    seconds: training alone, without validation. tokens: trained on, over all ranks.
    wire_bytes: bytes moved between ranks, by link class, of all ranks and with validation; empty without communication.
    """

    train_loss: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    validation_loss: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    wire_bytes: dict[str, int] = field(default_factory=dict)


# Called after every step with the number of steps done and the history so far.
OnStep = Callable[[int, History], None]
# Called in every step when the gradients are complete and no parameter has moved yet.
OnGradients = Callable[[int, ByteModel], None]


class Trainer:
    """Trains one replica of `model` as rank `dist.get_rank(group)`, or as the only one if there is no group."""

    def __init__(
        self, config: DemoConfig, model: ByteModel, corpus: Corpus, group: dist.ProcessGroup | None = None
    ) -> None:
        self.config, self.model, self.corpus, self.group = config, model, corpus, group
        self.num_ranks = dist.get_world_size(group) if group else 1
        self.rank = dist.get_rank(group) if group else 0
        self.shared = split_parameters(model).shared
        model.initialise(self.shared, config.seed)
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )

    def run(self, on_step: OnStep | None = None, on_gradients: OnGradients | None = None) -> History:
        config, history = self.config, History()
        for step in range(config.steps):
            started = time.perf_counter()
            loss = self._gradients(step)
            if on_gradients:
                on_gradients(step, self.model)
            history.balance.append(self._update(step))
            history.train_loss.append(loss)
            history.seconds += time.perf_counter() - started
            history.tokens += config.tokens_per_step
            if config.eval_every and (step + 1 == config.steps or step % config.eval_every == 0):
                history.validation_loss[step + 1] = self.validate()
            if on_step:
                on_step(step + 1, history)
        return history

    @torch.no_grad()
    def validate(self) -> float:
        """Loss on the held-out files, nats per byte."""
        self.model.eval()
        total = torch.zeros(())
        for index in range(self.config.eval_batches):
            batch = self.corpus.validation_batch(index, **self._batch_shape())
            total += self.model.loss(self._own_part(batch)) / (self.num_ranks * self.config.eval_batches)
        self.model.train()
        self._sum_over_ranks(total)
        return total.item()

    def _gradients(self, step: int) -> float:
        batch = self.corpus.batch(step, **self._batch_shape(), seed=self.config.seed)
        # Divided before the backward pass: the gradients of the experts sum over all ranks' tokens by themselves, the
        # others do so below, and both become gradients of the mean over the whole batch.
        loss = self.model.loss(self._own_part(batch)) / self.num_ranks
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        grads = [parameter.grad for parameter in self.shared if parameter.grad is not None]
        flat = torch.cat([loss.detach().reshape(1), *(grad.flatten() for grad in grads)])
        self._sum_over_ranks(flat)
        for grad, total in zip(grads, torch.split(flat[1:], [grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))
        return flat[0].item()

    def _update(self, step: int) -> float:
        for settings in self.optimiser.param_groups:
            settings["lr"] = self.config.learning_rate * _rate(step, self.config.steps)
        self.optimiser.step()
        balances = [load_balance(layer.update_bias(self.config.bias_speed)) for layer in self.model.moe_layers()]
        return sum(balances) / len(balances)

    def _batch_shape(self) -> dict[str, int]:
        return {"num_sequences": self.config.num_sequences, "length": self.config.sequence_length}

    def _own_part(self, batch: Tensor) -> Tensor:
        return batch.chunk(self.num_ranks)[self.rank]

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        if self.group:
            dist.all_reduce(tensor, group=self.group)


def train_distributed(
    config: DemoConfig,
    corpus: Corpus,
    group: dist.ProcessGroup,
    on_step: OnStep | None = None,
    on_gradients: OnGradients | None = None,
) -> History:
    """Train as one rank of `group`; all ranks call it with equal settings."""
    with Buffer(
        group,
        hidden=config.hidden,
        num_experts=config.num_experts,
        num_topk=config.num_topk,
        num_max_tokens_per_rank=config.tokens_per_step // config.num_ranks,
        ranks_per_node=config.ranks_per_node,
        layout=config.layout,
        timeout_s=config.timeout_s,
    ) as buffer:

        def make_moe(layer: int) -> MoELayer:
            return MoELayer(
                buffer,
                config.router,
                config.expert_intermediate,
                shared_intermediate=config.shared_intermediate,
                row_format=RowFormat(PAYLOADS[config.payload]),
                grad_format=RowFormat(PAYLOADS[config.grad_payload]),
                seed=layer,
            )

        history = Trainer(config, ByteModel(config, make_moe), corpus, group).run(on_step, on_gradients)
        sent = torch.tensor(list(buffer.wire_bytes.values()))
        dist.all_reduce(sent, group=group)
        history.wire_bytes = dict(zip(buffer.wire_bytes, sent.tolist(), strict=True))
    return history


def train_single_process(
    config: DemoConfig, corpus: Corpus, on_step: OnStep | None = None, on_gradients: OnGradients | None = None
) -> History:
    """Train the same model on the same batches in this process alone, without communication and its rounding."""
    return Trainer(config, ByteModel(config, lambda layer: DenseMoE(config, seed=layer)), corpus).run(
        on_step, on_gradients
    )


def _rate(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return warmup * (_FINAL_RATE + (1.0 - _FINAL_RATE) * cosine)
