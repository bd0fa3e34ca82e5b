"""Small residual networks of any width, for rotations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.testing import seeded


class Attention(nn.Module):
    """Self-attention with separate projections; options change what lies between products."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.between = heads, kv_heads or heads, between
        key_width = width // heads * self.kv_heads
        self.q, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, key_width), nn.Linear(width, key_width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, -1).transpose(1, 2)
        k = self.k(x).reshape(b, n, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).reshape(b, n, self.kv_heads, -1).transpose(1, 2)
        if self.between is not None:
            q, k = self.between(q), self.between(k)
        grouped = self.kv_heads < self.heads
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        z: Tensor = self.proj(y.transpose(1, 2).reshape(b, n, c))
        return z


class Expanded(Attention):
    """One head of keys and values, expanded over all heads of queries."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, -1).transpose(1, 2)
        k, v = (f(x).reshape(b, n, 1, -1).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        z: Tensor = self.proj(y.transpose(1, 2).reshape(b, n, c))
        return z


class Residual(nn.Module):
    """Blocks on a stream of tokens: embedding, class token, position, attention, MLP, final norm.

    Args:
        width: number of channels.
        heads: number of heads.
        depth: number of blocks.
        norm: makes each norm.
        scaled: whether LayerScale vectors multiply both branches.
        classes: number of classes; 0 outputs the tokens behind the final norm.
        attention: makes the attention of each block.
    """

    def __init__(
        self,
        width: int = 16,
        heads: int = 2,
        *,
        depth: int = 2,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        scaled: bool = False,
        classes: int = 5,
        attention: Callable[[int, int], nn.Module] = Attention,
    ) -> None:
        super().__init__()
        self.scaled = scaled
        self.embed = nn.Linear(6, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 5, width))
        self.norms = nn.ModuleList(norm(width) for _ in range(2 * depth))
        self.attention = nn.ModuleList(attention(width, heads) for _ in range(depth))
        self.fc1 = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.fc2 = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.scales = nn.ParameterList(torch.zeros(width) for _ in range(2 * depth))
        self.norm, self.head = norm(width), nn.Linear(width, classes) if classes else None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.position
        for i, (attention, fc1, fc2) in enumerate(
            zip(self.attention, self.fc1, self.fc2, strict=True)
        ):
            y = attention(self.norms[2 * i](x))
            x = x + (y * self.scales[2 * i] if self.scaled else y)
            y = fc2(F.gelu(fc1(self.norms[2 * i + 1](x))))
            x = x + (y * self.scales[2 * i + 1] if self.scaled else y)
        x = self.norm(x)
        return x if self.head is None else self.head(x[:, 0])


def points(batch: int = 2) -> Tensor:
    """Random inputs ``(batch, 4, 6)`` of :class:`Residual`."""
    return torch.randn(batch, 4, 6, generator=torch.Generator().manual_seed(batch))


def residual(width: int = 16, heads: int = 2, **options: object) -> nn.Module:
    """A seeded :class:`Residual`, its weights small enough for activations of ordinary size."""
    model = seeded(Residual(width, heads, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.div_(0.5 * module.in_features**0.5)
    return model


def outlying(width: int = 64) -> nn.Module:
    """A network whose stream has one channel far from the others."""
    model = copy.deepcopy(residual(width, 4))
    with torch.no_grad():
        model.position[..., 7] += 50 * model.position.std()
        for norm in (*model.norms, model.norm):
            norm.weight.fill_(1.0)
    return model
