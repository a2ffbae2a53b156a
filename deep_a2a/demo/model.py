"""A byte-level transformer whose feed-forward layers are MoE layers of the caller's making."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deep_a2a.demo.config import DemoConfig

VOCABULARY = 256
_HEAD_SCALE = 0.1


class MoE(Protocol):
    """What the training loop asks of an MoE layer beyond its forward pass."""

    def update_bias(self, speed: float) -> Tensor:
        """Balance by the load since the last call; returns that load, [num_experts]."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021, RoFormer)."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.w_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.w_out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, hidden]; returns the same shape."""
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.w_qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        out: Tensor = self.w_out(y.transpose(1, 2).flatten(2))
        return out


def rotate(x: Tensor) -> Tensor:
    """x: [..., length, channels]. Turns each pair (i, i + channels/2) of position p by p * 10000^(-2i/channels)."""
    length, channels = x.shape[-2:]
    speed = 10000.0 ** -(torch.arange(0, channels, 2) / channels)
    angle = torch.outer(torch.arange(length), speed)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


class Block(nn.Module):
    """x + attention, then x + MoE, each on normalised input."""

    def __init__(self, config: DemoConfig, moe: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config.hidden, config.num_heads)
        self.moe_norm = nn.RMSNorm(config.hidden)
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.moe(self.moe_norm(x))
        return y


class ByteModel(nn.Module):
    """Predicts the next byte.

    Args:
        config: sizes.
        make_moe: called with the number of each layer, returns its MoE layer: the distributed one, or a plain one.
    """

    def __init__(self, config: DemoConfig, make_moe: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, config.hidden)
        self.blocks = nn.ModuleList(Block(config, make_moe(layer)) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [batch, length]. Returns logits [batch, length, 256]."""
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, sequences: Tensor) -> Tensor:
        """sequences: int64 [batch, length + 1]. Returns the mean cross-entropy of all bytes but the first, in nats."""
        logits = self(sequences[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())

    def moe_layers(self) -> list[MoE]:
        """The layers that `make_moe` made."""
        return [cast(MoE, block.moe) for block in self.blocks]

    @torch.no_grad()
    def initialise(self, parameters: Sequence[nn.Parameter], seed: int) -> None:
        """Draw the matrices among `parameters` from one generator, so that every rank gets the same.

        Variance 1 / fan-in; 1 for the bytes' embedding; so little for the head that the loss starts at about ln 256.
        """
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            if parameter.dim() == 2:
                std = 1.0 if parameter is self.token.weight else parameter.shape[1] ** -0.5
                parameter.normal_(std=std, generator=generator)
        self.head.weight.mul_(_HEAD_SCALE)
