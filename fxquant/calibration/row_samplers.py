"""A bounded sample of the rows of one product, batch by batch.

Operands come in the shapes of the graph and are kept in the one form of
:class:`fxquant.search.product_loss.ProductSample`: ``(S, H, n, K) @ (S, H, K, N)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.config.scale_search import GRADIENT_METRICS, Metric
from fxquant.config.vocabulary import OpKind
from fxquant.graph.conv_patches import patches
from fxquant.graph.dialect import op_kind
from fxquant.graph.nodes import arguments, operand
from fxquant.search.product_loss import ProductSample

# Rows taken of one sample of an attention product; the rest of the limit is spent on samples.
_QUERIES = 32


class RowSampler(ABC):
    """Collects rows of one product; of an attention product samples, with some rows of each.

    The sample is uniform, or rows are drawn by how much they weigh in the Hessian metric, of whose
    sum a few uncertain images may hold most: priority sampling (Duffield, Lund, Thorup 2007) keeps
    those of largest ``w / u``, where u is uniform in (0, 1) and ``w = |gradient|^2 + its mean so
    far``. Each stands for ``max(w, t) / w`` rows, t being the largest priority left out, which
    makes every sum over the sample unbiased.

    Args:
        generator: draws the numbers.
        gradient: also keep the gradient of the output.
        weighed: draw rows by their gradient.
    """

    def __init__(self, generator: torch.Generator, *, gradient: bool, weighed: bool) -> None:
        self._generator, self._gradient, self._weighed = generator, gradient, weighed
        self._limit = 0
        self._kept: dict[str, Tensor] = {}
        # Of the rows kept, in float64 on the CPU; and the largest priority left out.
        self._weights = self._priorities = torch.zeros(0, dtype=torch.float64)
        self._threshold = 0.0
        self._seen, self._energy = 0, 0.0
        self._offered: tuple[Tensor, Tensor, Tensor] | None = None
        # Of the last batch; and whether in any batch it had a square.
        self.largest_gradient, self.reached = 0.0, False

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

    def offer(self, lhs: Tensor, rhs: Tensor, out: Tensor) -> None:
        """Shows a batch, whose rows are taken in :meth:`merge`, after the backward pass.

        Args:
            lhs: the left operand in the shape of the graph.
            rhs: the right one.
            out: the product, part of the autograd graph.
        """
        # Where the loss does not reach, no gradient arrives.
        self._offered = lhs, rhs, torch.zeros((), device=lhs.device).expand(out.shape)
        self.largest_gradient = 0.0
        if self._gradient and out.requires_grad:
            out.register_hook(self._arrive)  # type: ignore[no-untyped-call]

    def _arrive(self, gradient: Tensor) -> None:
        assert self._offered is not None
        self._offered = (*self._offered[:2], gradient)
        largest = gradient.abs().max()
        self.largest_gradient = float(largest)
        self.reached = self.reached or bool(largest.square())

    def merge(self) -> None:
        """Joins rows of the last batch with those kept so far."""
        if self._offered is None:
            return
        lhs, rhs, gradient = self._offered
        self._offered = None
        weights = self._weigh(self._energies(gradient))
        priorities = weights / torch.rand(
            len(weights), generator=self._generator, dtype=torch.float64
        )
        joined = torch.cat([self._priorities, priorities])
        order = joined.argsort(descending=True, stable=True)
        keep, rest = order[: self._limit], order[self._limit :]
        old, new = (part.sort().values for part in _split(keep, len(self._priorities)))
        index = new.to(lhs.device)
        for name, rows in self._select(lhs, rhs, gradient, index).items():
            if self._gradient or name != "gradient":
                kept = self._kept.get(name, rows[:0])
                self._kept[name] = torch.cat([kept[old.to(rows.device)], rows])
        if len(rest):
            self._threshold = max(self._threshold, float(joined[rest[0]]))
        self._weights = torch.cat([self._weights[old], weights[new]])
        self._priorities = torch.cat([self._priorities[old], priorities[new]])

    def _weigh(self, energies: Tensor) -> Tensor:
        """Weights ``(count,)`` of rows: their energy and, so that none is neglected, the mean."""
        if not self._weighed:
            return torch.ones(len(energies), dtype=torch.float64)
        energies = energies.double().cpu()
        self._seen, self._energy = self._seen + len(energies), self._energy + float(energies.sum())
        return energies + max(self._energy / self._seen, 1e-30)

    @abstractmethod
    def _energies(self, gradient: Tensor) -> Tensor:
        """Squared size of the gradient of each row of a batch."""

    @abstractmethod
    def _select(
        self, lhs: Tensor, rhs: Tensor, gradient: Tensor, index: Tensor
    ) -> dict[str, Tensor]:
        """Rows of a batch: the tensors to keep by name, along axis 0."""

    @abstractmethod
    def sample(self) -> ProductSample:
        """The rows kept."""

    def _counts(self) -> Tensor | None:
        """How many rows each stands for, ``(count,)``; None where all are alike."""
        if not self._weighed or not self._threshold:
            return None
        counts = self._weights.clamp(min=self._threshold) / self._weights
        return counts.float().to(self._kept["lhs"].device)

    def _kept_gradient(self) -> Tensor | None:
        """The gradient, scaled by how many rows each stands for.

        None if it or its square vanishes everywhere, so that it weighs nothing.
        """
        gradient = self._kept.get("gradient")
        if gradient is None or not bool(gradient.square().any()):
            return None
        counts = self._counts()
        if counts is None:
            return gradient
        return gradient * counts.sqrt().view(-1, *[1] * (gradient.ndim - 1))


def _split(index: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Positions in a joined tensor as those in its first part, of that length, and its second."""
    return index[index < first], index[index >= first] - first


class LinearRowSampler(RowSampler):
    """Of a linear or convolution, whose right operand is a constant weight.

    Args:
        weight: ``(out, in)`` or ``(out, in / groups, *kernel)``.
        groups: of a convolution.
        generator: see the base class.
        metric: that the rows are for.
    """

    def __init__(
        self, weight: Tensor, groups: int, generator: torch.Generator, metric: Metric
    ) -> None:
        super().__init__(
            generator, gradient=metric in GRADIENT_METRICS, weighed=metric is Metric.HESSIAN
        )
        self._weight, self._groups = weight.detach(), groups

    def bytes_for(self, rows: int) -> int:
        """Memory that a limit of that many rows takes."""
        depth = self._weight[0].numel() * self._groups
        return 4 * rows * (depth + self._weight.shape[0] * self._gradient)

    def _energies(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(0, -2).square().sum(1)

    def _select(
        self, lhs: Tensor, rhs: Tensor, gradient: Tensor, index: Tensor
    ) -> dict[str, Tensor]:
        return {
            "lhs": lhs.flatten(0, -2)[index],
            "gradient": gradient.flatten(0, -2)[index],
        }

    def sample(self) -> ProductSample:
        """``(1, groups, rows, K) @ (1, groups, K, N)``."""
        weight = torch.unflatten(self._weight.flatten(1), 0, (self._groups, -1))
        gradient = self._kept_gradient()
        return ProductSample(
            lhs=self._by_group(self._kept["lhs"]),
            rhs=weight.transpose(1, 2).unsqueeze(0),
            gradient=None if gradient is None else self._by_group(gradient),
            counts=self._counts(),
            channels=True,
        )

    def _by_group(self, rows: Tensor) -> Tensor:
        grouped = torch.unflatten(rows.flatten(1), 1, (self._groups, -1))
        return grouped.transpose(0, 1).unsqueeze(0).contiguous()


class ConvRowSampler(LinearRowSampler):
    """Of a convolution: a row is the patch under one position of the output."""

    def __init__(
        self, node: fx.Node, weight: Tensor, generator: torch.Generator, metric: Metric
    ) -> None:
        super().__init__(weight, int(arguments(node)["groups"]), generator, metric)
        self._node = node

    def _energies(self, gradient: Tensor) -> Tensor:
        return gradient.square().sum(1).flatten()

    def _select(
        self, lhs: Tensor, rhs: Tensor, gradient: Tensor, index: Tensor
    ) -> dict[str, Tensor]:
        at = torch.unravel_index(index, (gradient.shape[0], *gradient.shape[2:]))
        rows = patches(lhs, self._node, self._weight.shape)
        return {"lhs": rows[at], "gradient": gradient.movedim(1, -1)[at]}


class MatmulRowSampler(RowSampler):
    """Of a product of two activations: whole samples with some of their rows.

    Args:
        shapes: of the operands, ``(..., H, n, K)`` and ``(..., H, K, N)``.
        generator: see the base class.
        metric: that the rows are for.
    """

    def __init__(
        self,
        shapes: tuple[tuple[Any, ...], tuple[Any, ...]],
        generator: torch.Generator,
        metric: Metric,
    ) -> None:
        gradient = metric in GRADIENT_METRICS
        super().__init__(generator, gradient=gradient, weighed=gradient)
        left, right = shapes
        self._heads = _heads(left, right)
        self._queries = min(int(left[-2]), _QUERIES)
        self._drawn = torch.zeros(0)  # positions of the rows taken of the last batch
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

    def _energies(self, gradient: Tensor) -> Tensor:
        folded = self._folded(gradient)
        # Rows that the loss does not reach come last: behind a class token that is all but one.
        reached = (folded != 0).any(3).flatten(0, 1).any(0).cpu()
        keys = torch.rand(len(reached), generator=self._generator) + reached
        self._drawn = keys.topk(self._queries).indices.sort().values.to(gradient.device)
        return folded[:, :, self._drawn].square().sum((1, 2, 3))

    def _select(
        self, lhs: Tensor, rhs: Tensor, gradient: Tensor, index: Tensor
    ) -> dict[str, Tensor]:
        lead = gradient.shape[:-2]
        left = self._folded(lhs.expand(*lead, *lhs.shape[-2:]))
        right = self._folded(rhs.expand(*lead, *rhs.shape[-2:]))
        return {
            "lhs": left[index][:, :, self._drawn],
            "rhs": right[index],
            "gradient": self._folded(gradient)[index][:, :, self._drawn],
        }

    def _folded(self, x: Tensor) -> Tensor:
        """``(S, H, n, K)`` of ``(..., H, n, K)`` or ``(..., n, K)``."""
        return x.reshape(-1, self._heads, *x.shape[-2:])

    def sample(self) -> ProductSample:
        """``(S, H, n, K) @ (S, H, K, N)``."""
        return ProductSample(
            lhs=self._kept["lhs"],
            rhs=self._kept["rhs"],
            gradient=self._kept_gradient(),
            counts=self._counts(),
        )


def row_sampler(
    node: fx.Node, weight: Tensor | None, generator: torch.Generator, metric: Metric
) -> RowSampler | None:
    """The collector for a product; None for a form of it that is not sampled.

    Args:
        node: a quantizable operation.
        weight: its constant right operand, if it is one.
        generator: draws the rows.
        metric: that the rows are for.
    """
    kind = op_kind(node)
    left = operand(node, 0).meta["val"].shape
    if kind is OpKind.MATMUL:
        right = operand(node, 1).meta["val"].shape
        if len(left) < 2 or len(right) < 2:
            return None
        if not all(isinstance(size, int) for size in (*left[-2:], *right[-2:])):
            return None  # a matrix whose size changes with the batch
        return MatmulRowSampler((left, right), generator, metric)
    if weight is None or len(left) < (weight.ndim if kind is OpKind.CONV else 2):
        return None
    if kind is OpKind.CONV:
        return ConvRowSampler(node, weight, generator, metric)
    return LinearRowSampler(weight, 1, generator, metric)


def _heads(left: tuple[Any, ...], right: tuple[Any, ...]) -> int:
    """Axis -3 is one of heads where another, of samples, stands before it."""
    if max(len(left), len(right)) < 4:
        return 1
    sizes = [shape[-3] for shape in (left, right) if len(shape) > 2]
    whole = [size for size in sizes if isinstance(size, int)]
    return max(whole) if len(whole) == len(sizes) else 1
