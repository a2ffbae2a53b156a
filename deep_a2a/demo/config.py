"""Settings of the demo and its command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deep_a2a.routing import Router, groups_for_nodes
from deep_a2a.settings import LayoutName

PAYLOADS: dict[str, str | None] = {"bf16": None, "fp8": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}


@dataclass(frozen=True)
class DemoConfig:
    """A byte-level MoE language model and how to train it.

    One step takes `num_sequences` sequences of `sequence_length` bytes, shared out evenly over the ranks.
    """

    num_ranks: int = 8
    ranks_per_node: int = 4
    steps: int = 250
    num_sequences: int = 16
    sequence_length: int = 128
    hidden: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_experts: int = 32
    num_topk: int = 4
    expert_intermediate: int = 128
    shared_intermediate: int = 128
    topk_groups: int = 1
    learning_rate: float = 4e-3
    bias_speed: float = 0.01
    layout: LayoutName = "rank"
    payload: str = "fp8"
    grad_payload: str = "bf16"
    seed: int = 0
    corpus_bytes: int = 8 << 20
    eval_every: int = 25
    eval_batches: int = 4
    timeout_s: float = 120.0
    plot: Path = Path("train_moe.png")

    def __post_init__(self) -> None:
        for name in ("num_ranks", "ranks_per_node", "num_sequences", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        multiples = {"num_ranks": "ranks_per_node", "num_sequences": "num_ranks", "num_experts": "num_ranks"}
        for name, divisor in multiples.items():
            value, by = getattr(self, name), getattr(self, divisor)
            if value % by:
                raise ValueError(f"{name} is {value}, expected a multiple of {divisor} = {by}")
        if not 1 <= self.topk_groups <= self.num_nodes:
            raise ValueError(f"topk_groups is {self.topk_groups}, expected 1 to the number of nodes, {self.num_nodes}")

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def router(self) -> Router:
        """One group of experts per node, so that `topk_groups` limits the nodes of a token."""
        return Router(
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            num_groups=groups_for_nodes(self.num_nodes, self.num_experts),
            topk_groups=self.topk_groups,
            scaling_factor=1.0,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.num_sequences * self.sequence_length


_HELP = {
    "num_ranks": "processes to start; torchrun, where it has started this one, decides instead",
    "ranks_per_node": "ranks of a pretended node; rows for other nodes take the network path",
    "steps": "optimiser steps",
    "num_sequences": "sequences per step, of all ranks together",
    "topk_groups": "nodes that the experts of a token may lie on",
    "layout": "of the rows that the experts get",
    "payload": "of dispatch",
    "grad_payload": "of the gradients that the backward pass of combine sends",
    "seed": "of weights and batches",
    "plot": "PNG for the curves",
}
_CHOICES: dict[str, Sequence[str]] = {
    "layout": ("rank", "expert", "padded"),
    "payload": tuple(PAYLOADS),
    "grad_payload": tuple(PAYLOADS),
}


def parse_config(argv: Sequence[str] | None, prog: str) -> tuple[DemoConfig, bool]:
    """The settings that the command line asks for, and whether to train in one process without communication."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a small byte-level MoE language model on the sources of Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = DemoConfig()
    for name, text in _HELP.items():
        default = getattr(defaults, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default, choices=_CHOICES.get(name), help=text)
    parser.add_argument("--single-process", action="store_true", help="train the same model without communication")
    options = vars(parser.parse_args(argv))
    single_process: bool = options.pop("single_process")
    if started_by_torchrun():
        options["num_ranks"] = int(os.environ["WORLD_SIZE"])
    try:
        return DemoConfig(**options), single_process
    except ValueError as error:
        parser.error(str(error))


def started_by_torchrun() -> bool:
    """Whether this process is a rank already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
