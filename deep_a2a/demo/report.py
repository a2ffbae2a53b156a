"""What the demo shows: a progress bar, a summary and the curves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from deep_a2a.demo.config import DemoConfig
from deep_a2a.demo.train import History

_BAR_WIDTH = 30
_LINES_WITHOUT_TERMINAL = 10


class Progress:
    """A bar that is redrawn in place; where the output is no terminal, about ten lines over the whole run."""

    def __init__(self, steps: int, stream: TextIO = sys.stdout) -> None:
        self.steps, self.stream = steps, stream
        self.every = max(1, steps // _LINES_WITHOUT_TERMINAL)

    def __call__(self, done: int, history: History) -> None:
        rate = history.tokens / max(history.seconds, 1e-9)
        text = f"step {done:4d}/{self.steps}  loss {history.train_loss[-1]:.3f}  {rate:,.0f} tokens/s"
        if self.stream.isatty():
            filled = _BAR_WIDTH * done // self.steps
            bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
            self.stream.write(f"\r[{bar}] {text}\x1b[K" + ("\n" if done == self.steps else ""))
        elif done == 1 or done % self.every == 0 or done == self.steps:
            self.stream.write(text + "\n")
        self.stream.flush()


def headline(config: DemoConfig, single_process: bool) -> str:
    """What is about to be trained, in one line."""
    where = (
        "one process, no communication"
        if single_process
        else f"{config.num_ranks} ranks in {config.num_nodes} nodes, layout {config.layout}, "
        f"{config.payload} dispatch, bf16 combine"
    )
    return f"MoE of {config.num_experts} experts, top-{config.num_topk}, {config.num_layers} layers; {where}"


def summary(history: History) -> str:
    """The results, one per line."""
    step, validation = max(history.validation_loss.items(), default=(0, float("nan")))
    first_step, first_validation = min(history.validation_loss.items(), default=(0, float("nan")))
    lines = [
        f"loss          train {history.train_loss[0]:.3f} -> {history.train_loss[-1]:.3f} nats/byte",
        f"              validation {first_validation:.3f} (step {first_step}) -> {validation:.3f} (step {step})",
        f"speed         {history.tokens / max(history.seconds, 1e-9):,.0f} tokens/s over {history.seconds:.1f} s",
        f"load balance  {history.balance[0]:.2f} -> {history.balance[-1]:.2f} (busiest expert / mean)",
    ]
    if history.wire_bytes:
        classes = ", ".join(f"{name} {moved / 1e6:,.1f} MB" for name, moved in history.wire_bytes.items())
        lines.append(f"bytes moved   {classes} (all ranks, validation included)")
    return "\n".join(lines)


def plot(history: History, path: Path) -> str:
    """Write the curves to `path` as PNG. Returns the line to print: where they are, or what is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no curves: matplotlib is not installed (pip install 'deep-a2a[bench]')"
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, balance_axes = figure.subplots(1, 2)
    steps = range(1, len(history.train_loss) + 1)
    loss_axes.plot(steps, history.train_loss, label="train")
    loss_axes.plot(list(history.validation_loss), list(history.validation_loss.values()), "o-", label="validation")
    loss_axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Loss")
    loss_axes.legend()
    balance_axes.plot(steps, history.balance)
    balance_axes.axhline(1.0, color="grey", linestyle="--")
    balance_axes.set(xlabel="step", ylabel="busiest expert / mean", title="Load balance")
    figure.savefig(path, dpi=120)
    return f"curves        {path}"
