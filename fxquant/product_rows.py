"""A bounded uniform sample of the rows of one product, batch by batch.

Operands come in the shapes of the graph and are kept in the one form of
:class:`fxquant.search.output.ProductSample`: ``(S, H, n, K) @ (S, H, K, N)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxquant.graph import arguments, op_kind, operand
from fxquant.search.output import ProductSample
from fxquant.spec import OpKind

# Rows taken of one sample of an attention product; the rest of the limit is spent on samples.
_QUERIES = 64


class ProductRows(ABC):
    """Collects rows of one product.

    Every row (of an attention product: every sample) draws a random number, and those with the
    largest are kept; so the sample is uniform however many rows come.

    Args:
        generator: draws the numbers.
        gradient: also keep the gradient of the output.
    """

    def __init__(self, generator: torch.Generator, *, gradient: bool) -> None:
        self._generator, self._gradient = generator, gradient
        self._limit = 0
        self._keys = torch.zeros(0)
        self._kept: dict[str, Tensor] = {}
        self._new_keys = torch.zeros(0)
        self._new: dict[str, Tensor] = {}

    @property
    def filled(self) -> bool:
        """Whether any row came."""
        return bool(self._kept)

    @abstractmethod
    def bytes_for(self, rows: int) -> int:
        """Memory that a limit of that many rows, at least 1, takes."""

    def set_limit(self, rows: int) -> None:
        """Bounds the number of rows kept."""
        self._limit = rows

    @abstractmethod
    def offer(self, lhs: Tensor, rhs: Tensor, out: Tensor) -> None:
        """Takes a batch; the gradient of ``out`` follows when it is computed."""

    def merge(self) -> None:
        """Joins the rows of the last batch, if it had any, with those kept so far."""
        keys = torch.cat([self._keys, self._new_keys])
        best = keys.topk(min(self._limit, len(keys))).indices
        for name, rows in self._new.items():
            joined = torch.cat([self._kept[name], rows]) if name in self._kept else rows
            self._kept[name] = joined[best.to(joined.device)]
        self._keys, self._new, self._new_keys = keys[best], {}, torch.zeros(0)

    @abstractmethod
    def sample(self) -> ProductSample:
        """The rows kept."""

    def _draw(self, count: int) -> Tensor:
        """Indices of the rows of a batch that are to be kept."""
        keys = torch.rand(count, generator=self._generator)
        best = keys.topk(min(self._limit, count)).indices
        if len(self._keys) == self._limit:
            best = best[keys[best] > self._keys.min()]
        self._new_keys = keys[best]
        return best

    def _keep(self, lhs: Tensor, out: Tensor, take: Any) -> None:
        """Keeps rows, and a place for their gradient, zero where the loss does not reach."""
        self._new["lhs"] = lhs
        if not self._gradient:
            return
        self._new["gradient"] = torch.zeros_like(take(out.detach()))

        def arrive(gradient: Tensor) -> None:
            self._new["gradient"] = take(gradient)

        if out.requires_grad:
            out.register_hook(arrive)  # type: ignore[no-untyped-call]

    def _kept_gradient(self) -> Tensor | None:
        """The gradient; None if it vanishes everywhere, so that it weighs nothing."""
        gradient = self._kept.get("gradient")
        return gradient if gradient is not None and bool(gradient.any()) else None


class LinearRows(ProductRows):
    """Of a linear or convolution, whose right operand is a constant weight.

    Args:
        weight: ``(out, in)`` or ``(out, in / groups, *kernel)``.
        groups: of a convolution.
        generator: see the base class.
        gradient: see the base class.
    """

    def __init__(
        self, weight: Tensor, groups: int, generator: torch.Generator, *, gradient: bool
    ) -> None:
        super().__init__(generator, gradient=gradient)
        self._weight, self._groups = weight.detach(), groups

    def bytes_for(self, rows: int) -> int:
        """Memory that a limit of that many rows takes."""
        depth = self._weight[0].numel() * self._groups
        return 4 * rows * (depth + self._weight.shape[0] * self._gradient)

    def offer(self, lhs: Tensor, rhs: Tensor, out: Tensor) -> None:
        """Takes ``(..., in)`` and ``(..., out)``."""
        rows = lhs.flatten(0, -2)
        index = self._draw(len(rows)).to(lhs.device)
        self._keep(rows[index], out, lambda value: value.flatten(0, -2)[index])

    def sample(self) -> ProductSample:
        """``(1, groups, rows, K) @ (1, groups, K, N)``."""
        weight = torch.unflatten(self._weight.flatten(1), 0, (self._groups, -1))
        gradient = self._kept_gradient()
        return ProductSample(
            lhs=self._by_group(self._kept["lhs"]),
            rhs=weight.transpose(1, 2).unsqueeze(0),
            gradient=None if gradient is None else self._by_group(gradient),
            channels=True,
        )

    def _by_group(self, rows: Tensor) -> Tensor:
        grouped = torch.unflatten(rows.flatten(1), 1, (self._groups, -1))
        return grouped.transpose(0, 1).unsqueeze(0).contiguous()


class ConvRows(LinearRows):
    """Of a convolution: a row is the patch under one position of the output."""

    def __init__(
        self, node: fx.Node, weight: Tensor, generator: torch.Generator, *, gradient: bool
    ) -> None:
        given = arguments(node)
        super().__init__(weight, int(given["groups"]), generator, gradient=gradient)
        self._axes = weight.ndim - 2
        self._stride, self._dilation = given["stride"], given["dilation"]
        self._padding = given["padding"]

    def offer(self, lhs: Tensor, rhs: Tensor, out: Tensor) -> None:
        """Takes ``(B, C, *spatial)`` and ``(B, N, *spatial')``."""
        shape = (out.shape[0], *out.shape[2:])
        flat = self._draw(shape[0] * out[0, 0].numel()).to(lhs.device)
        index = torch.unravel_index(flat, shape)
        patches = self._patches(lhs)
        self._keep(patches[index], out, lambda value: value.movedim(1, -1)[index])

    def _patches(self, x: Tensor) -> Tensor:
        """``(B, *spatial', C, *kernel)``, a view but for the padding."""
        kernel = self._weight.shape[2:]
        for axis, taps in enumerate(kernel):
            span = self._dilation[axis % len(self._dilation)] * (taps - 1)
            before, after = self._pads(axis, span)
            # Spatial axes still to come and taps already opened stand behind this one.
            amounts = [0, 0] * (self._axes - 1) + [before, after]
            x = functional.pad(x, amounts) if before or after else x
            stride = self._stride[axis % len(self._stride)]
            x = x.unfold(2 + axis, span + 1, stride)
            x = x[..., :: self._dilation[axis % len(self._dilation)]]
        return x.movedim(1, 1 + self._axes)

    def _pads(self, axis: int, span: int) -> tuple[int, int]:
        if self._padding == "same":
            return span // 2, span - span // 2
        if self._padding == "valid":
            return 0, 0
        amount = int(self._padding[axis % len(self._padding)])
        return amount, amount


class MatmulRows(ProductRows):
    """Of a product of two activations: whole samples with some of their rows.

    Args:
        shapes: of the operands, ``(..., H, n, K)`` and ``(..., H, K, N)``.
        generator: see the base class.
        gradient: see the base class.
    """

    def __init__(
        self,
        shapes: tuple[tuple[Any, ...], tuple[Any, ...]],
        generator: torch.Generator,
        *,
        gradient: bool,
    ) -> None:
        super().__init__(generator, gradient=gradient)
        left, right = shapes
        self._heads = _heads(left, right)
        self._queries = min(int(left[-2]), _QUERIES)
        self._depth, self._columns = int(left[-1]), int(right[-1])

    def bytes_for(self, rows: int) -> int:
        """Memory that a limit of that many rows takes, the right operands included."""
        queries = min(self._queries, rows)
        row = self._depth + self._columns * self._gradient
        sample = queries * row + self._depth * self._columns
        samples = rows // queries
        return 4 * self._heads * samples * sample

    def set_limit(self, rows: int) -> None:
        """Bounds the number of samples by that of rows."""
        self._queries = min(self._queries, rows)
        self._limit = rows // self._queries

    def offer(self, lhs: Tensor, rhs: Tensor, out: Tensor) -> None:
        """Takes both operands and the product."""
        lead = out.shape[:-2]
        left = self._folded(lhs.expand(*lead, *lhs.shape[-2:]))
        right = self._folded(rhs.expand(*lead, *rhs.shape[-2:]))
        index = self._draw(len(left)).to(lhs.device)
        order = torch.randperm(left.shape[2], generator=self._generator)
        rows = order[: self._queries].sort().values.to(lhs.device)
        self._new["rhs"] = right[index]
        self._keep(
            left[index][:, :, rows], out, lambda value: self._folded(value)[index][:, :, rows]
        )

    def _folded(self, x: Tensor) -> Tensor:
        """``(S, H, n, K)`` of ``(..., H, n, K)`` or ``(..., n, K)``."""
        return x.reshape(-1, self._heads, *x.shape[-2:])

    def sample(self) -> ProductSample:
        """``(S, H, n, K) @ (S, H, K, N)``."""
        return ProductSample(
            lhs=self._kept["lhs"], rhs=self._kept["rhs"], gradient=self._kept_gradient()
        )


def rows_of(
    node: fx.Node, weight: Tensor | None, generator: torch.Generator, *, gradient: bool
) -> ProductRows | None:
    """The collector for a product; None for a form of it that is not sampled.

    Args:
        node: a quantizable operation.
        weight: its constant right operand, if it is one.
        generator: draws the rows.
        gradient: also collect the gradient of the output.
    """
    kind = op_kind(node)
    left = operand(node, 0).meta["val"].shape
    if kind is OpKind.MATMUL:
        right = operand(node, 1).meta["val"].shape
        if len(left) < 2 or len(right) < 2:
            return None
        if not all(isinstance(size, int) for size in (*left[-2:], *right[-2:])):
            return None  # a matrix whose size changes with the batch
        return MatmulRows((left, right), generator, gradient=gradient)
    if weight is None or (kind is OpKind.CONV and len(left) < weight.ndim):
        return None
    if kind is OpKind.CONV:
        return ConvRows(node, weight, generator, gradient=gradient)
    return LinearRows(weight, 1, generator, gradient=gradient)


def _heads(left: tuple[Any, ...], right: tuple[Any, ...]) -> int:
    """Axis -3 is one of heads where another, of samples, stands before it."""
    if max(len(left), len(right)) < 4:
        return 1
    sizes = [shape[-3] for shape in (left, right) if len(shape) > 2]
    whole = [size for size in sizes if isinstance(size, int)]
    return max(whole) if len(whole) == len(sizes) else 1
