"""Owns the network of the bundled model in PyTorch: a small Llama. Training only; nothing at run time imports it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network; `rope_base` and `norm_eps` go into the GGUF as they are."""

    n_vocab: int
    width: int = 128
    n_layers: int = 4
    n_heads: int = 4
    feed_forward: int = 384
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.n_heads


class Norm(nn.Module):  # type: ignore[misc, unused-ignore]
    """RMS norm. PyTorch's own took a third of a step on a CPU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.eps = shape.norm_eps
        self.weight = nn.Parameter(torch.ones(shape.width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class Block(nn.Module):  # type: ignore[misc, unused-ignore]
    """One layer: attention with interleaved rotary pairs (the order of llama.cpp's `llama`), then a gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.attn_norm = Norm(shape)
        self.attn_qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.attn_output = nn.Linear(shape.width, shape.width, bias=False)
        self.ffn_norm = Norm(shape)
        self.ffn_gate_up = nn.Linear(shape.width, 2 * shape.feed_forward, bias=False)
        self.ffn_down = nn.Linear(shape.feed_forward, shape.width, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.attn_qkv(self.attn_norm(x)).view(rows, length, 3, self.shape.n_heads, self.shape.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # PyTorch's own attention has a slow backward pass on a CPU for sequences as short as these
        scores = _rotated(q, rope) @ _rotated(k, rope).transpose(-1, -2) * self.shape.head_width**-0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(rows, length, width))
        gate, up = self.ffn_gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.ffn_down(functional.silu(gate) * up)


class Llama(nn.Module):  # type: ignore[misc, unused-ignore]
    """Token ids to logits, the output head tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.width)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.output_norm = Norm(shape)
        for name, weight in self.named_parameters():
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                nn.init.zeros_(weight)  # so that the residual stream begins as the embedding alone
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.05)

    def forward(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Logits (n, n_vocab) at the positions where the boolean mask `wanted` of the tokens' shape is set."""
        x = self.token_embd(tokens)
        rope = _rope(self.shape, tokens.shape[1])
        for block in self.blk:
            x = block(x, rope)
        return functional.linear(self.output_norm(x[wanted]), self.token_embd.weight)


def _rope(shape: Shape, length: int) -> Tensor:
    """Cosines and sines, (2, length, head_width / 2)."""
    rates = shape.rope_base ** (-torch.arange(0, shape.head_width, 2) / shape.head_width)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.cos(), angles.sin()))


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = rope
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
