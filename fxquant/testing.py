"""Toy modules and graph assertions for tests of passes and backends.

The modules write products in the forms that vision transformers use, in the smallest sizes that
preserve the form: ``(B, N, C)`` tokens of width ``DIM``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxquant.graph.capture import capture
from fxquant.graph.dialect import op_kind
from fxquant.graph.nodes import operation_name
from fxquant.passes import Pass, PassResult, run_passes

DIM, HEADS, TOKENS = 8, 2, 5


def tokens(batch: int = 2) -> Tensor:
    """Random tokens ``(batch, TOKENS, DIM)``, equal for equal batch sizes."""
    return torch.randn(batch, TOKENS, DIM, generator=torch.Generator().manual_seed(batch))


def images(batch: int = 2, size: int = 8) -> Tensor:
    """Random images ``(batch, 3, size, size)``, equal for equal arguments."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws the parameters and running statistics of ``module``, and sets it to eval mode.

    Running variances are positive; every batch norm and layer norm changes its input.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            tensor.normal_(0.0, 0.5, generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module.eval()


def op_names(gm: fx.GraphModule) -> list[str]:
    """Operations of a graph in order: ``["linear", "reshape", …]``.

    Operators are listed by their name without namespace and overload, Python functions by their
    name, modules by their class. Parameters, the placeholder and size arithmetic are left out.
    """
    names = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            names.append(type(gm.get_submodule(str(node.target))).__name__)
        elif node.op == "call_function":
            name = operation_name(node)
            if name not in ("sym_size", "getitem"):
                names.append(name)
    return names


def product_names(gm: fx.GraphModule) -> list[str]:
    """Names of the quantizable nodes, in graph order."""
    return [node.name for node in gm.graph.nodes if op_kind(node) is not None]


@torch.no_grad()
def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference of two outputs over the largest expected value.

    Outputs may be nested in tuples, lists and dicts. Positions that hold NaN or infinity in both
    count as equal.

    Raises:
        AssertionError: the outputs differ in structure or shape.
    """
    one, two = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(one) == len(two), f"{len(one)} outputs, expected {len(two)}"
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        assert a.shape == b.shape, f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        same = (a == b) | (a.isnan() & b.isnan())
        error = torch.where(same, 0.0, (a - b).double().abs())
        finite = torch.where(torch.isfinite(b), b, torch.zeros_like(b)).double().abs()
        worst = max(worst, float(error.max() / finite.max().clamp(min=1e-30)))
    return worst


def assert_same_function(gm: nn.Module, model: nn.Module, x: Tensor, tol: float = 1e-5) -> None:
    """Checks that two models compute the same outputs.

    Args:
        gm: the rewritten model.
        model: the reference.
        x: input of both models; also negated, halved, and concatenated along the batch.
        tol: largest difference allowed, relative to the largest output.

    Raises:
        AssertionError: the outputs differ.
    """
    with torch.no_grad():
        for batch in (x, x[:1], torch.cat([x, -x, 0.5 * x])):
            error = relative_error(gm(batch), model(batch))
            assert error <= tol, f"batch {len(batch)}: the outputs differ by {error:.1e}"


def assert_pass(
    model: nn.Module,
    x: Tensor,
    item: Pass,
    *,
    before: Iterable[Pass] = (),
    changed: int,
    tol: float = 1e-5,
) -> tuple[fx.GraphModule, PassResult]:
    """Runs a FLOAT pass on a captured model and checks the duties of every such pass.

    The pass changes the stated number of sites, preserves the function, and changes nothing when it
    is run again.

    Args:
        model: a model in eval mode.
        x: input of the model.
        item: the pass.
        before: passes to run first.
        changed: number of sites that the pass must change.
        tol: as in :func:`assert_same_function`.

    Returns:
        The rewritten graph, and the result of the first run.

    Raises:
        AssertionError: the pass violates one of the duties.
    """
    gm = capture(model, x)
    run_passes(gm, before)
    result = run_passes(gm, [item])[type(item).__name__]
    assert result.changed == changed, f"{result.changed} sites changed, expected {changed}"
    assert_same_function(gm, model, x, tol)
    once = op_names(gm)
    again = run_passes(gm, [item])[type(item).__name__]
    assert again.changed == 0, f"the second run changed {again.changed} sites"
    assert op_names(gm) == once, "the second run changed the graph"
    assert again.notes == result.notes, "the second run refused other sites"
    return gm, result


class PackedAttention(nn.Module):
    """Self-attention in the form of timm's ViT: one ``qkv`` linear, axes (3, heads, channel)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over tokens ``(B, N, C)``."""
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        z: Tensor = self.proj(y.transpose(1, 2).reshape(b, n, c))
        return z


class PerHeadAttention(nn.Module):
    """LeViT's packing: each head's query, key and value next to each other, of unequal widths."""

    def __init__(self, key: int = 2, value: int = 4) -> None:
        super().__init__()
        self.widths = [key, key, value]
        self.qkv = nn.Linear(DIM, HEADS * sum(self.widths))
        self.proj = nn.Linear(HEADS * value, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over tokens ``(B, N, C)``."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, HEADS, -1).split(self.widths, dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        y = (q @ k * self.widths[0] ** -0.5).softmax(-1) @ v
        z: Tensor = self.proj(y.transpose(1, 2).reshape(b, n, -1))
        return z


class KvAttention(nn.Module):
    """PVT's packing: queries in one linear, keys and values in a second linear."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(DIM, DIM)
        self.kv = nn.Linear(DIM, 2 * DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over tokens ``(B, N, C)``."""
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, HEADS, -1).permute(0, 2, 1, 3)
        k, v = self.kv(x).reshape(b, n, 2, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(b, n, c)


class TorchAttention(nn.Module):
    """torch.nn.MultiheadAttention over its input, batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over tokens ``(B, N, C)``."""
        y, _ = self.attn(x, x, x, need_weights=False)
        assert isinstance(y, Tensor)
        return y


class FusedAttention(nn.Module):
    """A call of ``scaled_dot_product_attention`` with any of its options.

    Args:
        mask: ``(N, N)``: floats that are added to the scores, or booleans, where False masks.
        options: ``is_causal``, ``scale``, ``enable_gqa``.
        kv_heads: number of heads of keys and values; fewer than ``HEADS`` need ``enable_gqa``.
    """

    mask: Tensor | None

    def __init__(
        self, mask: Tensor | None = None, *, kv_heads: int = HEADS, **options: Any
    ) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.kv_heads, self.options = kv_heads, options

    def forward(self, x: Tensor) -> Tensor:
        """Attends over tokens ``(B, N, C)``, which are queries, keys and values."""
        b, n, c = x.shape
        q = x.reshape(b, n, HEADS, c // HEADS).transpose(1, 2)
        kv = q[:, : self.kv_heads]
        y = F.scaled_dot_product_attention(q, kv, kv + 1, attn_mask=self.mask, **self.options)
        return y.transpose(1, 2).reshape(b, n, c)


class Einsum(nn.Module):
    """Attention scores written as an einsum."""

    def forward(self, x: Tensor) -> Tensor:
        """Scores of tokens ``(B, N, C)``: ``(B, N, N)``."""
        return torch.einsum("bnc,bmc->bnm", x, x)


class Products(nn.Module):
    """A linear written as ``addmm``, then a product of activations written as ``bmm``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(DIM, DIM))
        self.bias = nn.Parameter(torch.empty(DIM))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` to ``(B, N, N)``."""
        y = torch.addmm(self.bias, x.flatten(0, 1), self.weight).reshape(x.shape)
        return torch.bmm(y, x.transpose(1, 2))


class ConvNorm(nn.Module):
    """A convolution, a batch norm and a relu, on images ``(B, 3, H, W)``."""

    def __init__(self, *, bias: bool = False, groups: int = 1, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=bias, groups=groups)
        self.bn = nn.BatchNorm2d(6, eps=0.1, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps ``(B, 6, H, W)``."""
        return F.relu(self.bn(self.conv(x)))


class LinearNorm(nn.Module):
    """LeViT's linear: batch norm over tokens flattened to ``(B * N, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 2 * DIM, bias=False)
        self.bn = nn.BatchNorm1d(2 * DIM, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` to ``(B, N, 2 C)``."""
        y = self.linear(x)
        z = self.bn(y.flatten(0, 1))
        assert isinstance(z, Tensor)
        return z.reshape_as(y)


class Block(nn.Module):
    """A transformer block: norm, attention, norm, MLP; the smallest model with every producer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = PackedAttention()
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` to tokens."""
        x = x + self.attn(self.norm1(x))
        y: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + y
