"""A bounded sample of the rows of one product, batch by batch.

Operands arrive in the shapes of the graph and are stored in the form of
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

# Rows of one sample of an attention product; the limit on rows then bounds the number of samples.
_QUERIES_PER_SAMPLE = 32


class RowSampler(ABC):
    """Samples rows of one product; of an attention product, whole samples with some rows of each.

    The sample is uniform, or rows are drawn by their weight in the Hessian metric, in whose sum a
    few uncertain images may dominate: priority sampling (Duffield, Lund, Thorup 2007) keeps the
    rows of largest ``w / u``, where u is uniform in (0, 1) and ``w = |gradient|^2 + its mean over
    the rows so far``. Each kept row represents ``max(w, t) / w`` rows, where t is the largest
    priority left out, which makes every sum over the sample unbiased.

    Args:
        generator: draws the random numbers.
        gradient: also keep the gradient of the output.
        weighted: draw rows by their gradient.
    """

    def __init__(self, generator: torch.Generator, *, gradient: bool, weighted: bool) -> None:
        self._generator, self._gradient, self._weighted = generator, gradient, weighted
        self._limit = 0
        self._rows: dict[str, Tensor] = {}
        # Weights and priorities of the kept rows, in float64 on the CPU; the largest one left out.
        self._weights = self._priorities = torch.zeros(0, dtype=torch.float64)
        self._threshold = 0.0
        self._seen, self._energy = 0, 0.0
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None
        # Largest gradient of the last batch; whether the square of any batch's was not zero.
        self.largest_gradient, self.reached = 0.0, False

    @property
    def filled(self) -> bool:
        """Whether any row was sampled."""
        return bool(self._rows)

    @abstractmethod
    def bytes_for(self, rows: int) -> int:
        """Memory of a sample with a limit of ``rows`` rows, at least 1."""

    def set_limit(self, rows: int) -> None:
        """Sets the largest number of rows to keep."""
        self._limit = rows

    def observe(self, lhs: Tensor, rhs: Tensor, out: Tensor) -> None:
        """Receives a batch; :meth:`commit` samples its rows after the backward pass.

        Args:
            lhs: the left operand in the shape of the graph.
            rhs: the right operand.
            out: the product, a tensor of the autograd graph.
        """
        # The gradient stays zero where the loss does not depend on the product.
        self._pending = lhs, rhs, torch.zeros((), device=lhs.device).expand(out.shape)
        self.largest_gradient = 0.0
        if self._gradient and out.requires_grad:
            out.register_hook(self._receive_gradient)  # type: ignore[no-untyped-call]

    def _receive_gradient(self, gradient: Tensor) -> None:
        assert self._pending is not None
        self._pending = (*self._pending[:2], gradient)
        largest = gradient.abs().max()
        self.largest_gradient = float(largest)
        self.reached = self.reached or bool(largest.square())

    def commit(self) -> None:
        """Samples from the rows of the last batch and the rows kept before it."""
        if self._pending is None:
            return
        lhs, rhs, gradient = self._pending
        self._pending = None
        weights = self._row_weights(self._energies(gradient))
        priorities = weights / torch.rand(
            len(weights), generator=self._generator, dtype=torch.float64
        )
        joined = torch.cat([self._priorities, priorities])
        order = joined.argsort(descending=True, stable=True)
        included, excluded = order[: self._limit], order[self._limit :]
        earlier = len(self._priorities)  # the first positions are those of earlier batches
        old = included[included < earlier].sort().values
        new = included[included >= earlier].sort().values - earlier
        index = new.to(lhs.device)
        for name, rows in self._select(lhs, rhs, gradient, index).items():
            if self._gradient or name != "gradient":
                old_rows = self._rows.get(name, rows[:0])
                self._rows[name] = torch.cat([old_rows[old.to(rows.device)], rows])
        if len(excluded):
            self._threshold = max(self._threshold, float(joined[excluded[0]]))
        self._weights = torch.cat([self._weights[old], weights[new]])
        self._priorities = torch.cat([self._priorities[old], priorities[new]])

    def _row_weights(self, energies: Tensor) -> Tensor:
        """Weights ``(count,)`` of rows: the energy plus the mean energy, so that all have some."""
        if not self._weighted:
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
        """The sampled rows, in the form of the search."""

    def _counts(self) -> Tensor | None:
        """Number of rows that each kept row represents, ``(count,)``; None where all are equal."""
        if not self._weighted or not self._threshold:
            return None
        counts = self._weights.clamp(min=self._threshold) / self._weights
        return counts.float().to(self._rows["lhs"].device)

    def _kept_gradient(self) -> Tensor | None:
        """The gradient, scaled by the root of the number of rows that each row represents.

        None where the gradient or its square is zero everywhere, so that it cannot weight errors.
        """
        gradient = self._rows.get("gradient")
        if gradient is None or not bool(gradient.square().any()):
            return None
        counts = self._counts()
        if counts is None:
            return gradient
        return gradient * counts.sqrt().view(-1, *[1] * (gradient.ndim - 1))


class LinearRowSampler(RowSampler):
    """Samples rows of a linear or convolution, whose right operand is a constant weight.

    Args:
        weight: ``(out, in)`` or ``(out, in / groups, *kernel)``.
        groups: number of groups of a convolution.
        generator: draws the random numbers.
        metric: metric of the search that uses the rows.
    """

    def __init__(
        self, weight: Tensor, groups: int, generator: torch.Generator, metric: Metric
    ) -> None:
        super().__init__(
            generator, gradient=metric in GRADIENT_METRICS, weighted=metric is Metric.HESSIAN
        )
        self._weight, self._groups = weight.detach(), groups

    def bytes_for(self, rows: int) -> int:
        """Memory of a sample with a limit of ``rows`` rows."""
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
            lhs=self._by_group(self._rows["lhs"]),
            rhs=weight.transpose(1, 2).unsqueeze(0),
            gradient=None if gradient is None else self._by_group(gradient),
            counts=self._counts(),
            channels=True,
        )

    def _by_group(self, rows: Tensor) -> Tensor:
        grouped = torch.unflatten(rows.flatten(1), 1, (self._groups, -1))
        return grouped.transpose(0, 1).unsqueeze(0).contiguous()


class ConvRowSampler(LinearRowSampler):
    """Samples rows of a convolution: a row is the patch under one position of the output."""

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
        positions = torch.unravel_index(index, (gradient.shape[0], *gradient.shape[2:]))
        rows = patches(lhs, self._node, self._weight.shape)
        return {"lhs": rows[positions], "gradient": gradient.movedim(1, -1)[positions]}


class MatmulRowSampler(RowSampler):
    """Samples a product of two activations: whole samples with some of their rows.

    Args:
        shapes: shapes of the operands, ``(..., H, n, K)`` and ``(..., H, K, N)``.
        generator: draws the random numbers.
        metric: metric of the search that uses the rows.
    """

    def __init__(
        self,
        shapes: tuple[tuple[Any, ...], tuple[Any, ...]],
        generator: torch.Generator,
        metric: Metric,
    ) -> None:
        gradient = metric in GRADIENT_METRICS
        super().__init__(generator, gradient=gradient, weighted=gradient)
        lhs_shape, rhs_shape = shapes
        self._heads = _heads(lhs_shape, rhs_shape)
        self._queries = min(int(lhs_shape[-2]), _QUERIES_PER_SAMPLE)
        self._query_positions = torch.zeros(0)  # positions of the rows sampled of the last batch
        self._depth, self._columns = int(lhs_shape[-1]), int(rhs_shape[-1])

    def bytes_for(self, rows: int) -> int:
        """Memory of a sample with a limit of ``rows`` rows, the right operands included."""
        queries = min(self._queries, rows)
        row = self._depth + self._columns * self._gradient
        sample = queries * row + self._depth * self._columns
        samples = rows // queries
        return 4 * self._heads * samples * sample

    def set_limit(self, rows: int) -> None:
        """Sets the largest number of samples from the largest number of rows."""
        self._queries = min(self._queries, rows)
        self._limit = rows // self._queries

    def _energies(self, gradient: Tensor) -> Tensor:
        folded = self._folded(gradient)
        # Rows without a gradient come last: before a class token all rows but one have none.
        reached = (folded != 0).any(3).flatten(0, 1).any(0).cpu()
        keys = torch.rand(len(reached), generator=self._generator) + reached
        self._query_positions = keys.topk(self._queries).indices.sort().values.to(gradient.device)
        return folded[:, :, self._query_positions].square().sum((1, 2, 3))

    def _select(
        self, lhs: Tensor, rhs: Tensor, gradient: Tensor, index: Tensor
    ) -> dict[str, Tensor]:
        lead = gradient.shape[:-2]
        return {
            "lhs": self._folded(lhs.expand(*lead, *lhs.shape[-2:]))[index][
                :, :, self._query_positions
            ],
            "rhs": self._folded(rhs.expand(*lead, *rhs.shape[-2:]))[index],
            "gradient": self._folded(gradient)[index][:, :, self._query_positions],
        }

    def _folded(self, x: Tensor) -> Tensor:
        """Reshapes ``(..., H, n, K)`` or ``(..., n, K)`` to ``(S, H, n, K)``."""
        return x.reshape(-1, self._heads, *x.shape[-2:])

    def sample(self) -> ProductSample:
        """``(S, H, n, K) @ (S, H, K, N)``."""
        return ProductSample(
            lhs=self._rows["lhs"],
            rhs=self._rows["rhs"],
            gradient=self._kept_gradient(),
            counts=self._counts(),
        )


def row_sampler(
    node: fx.Node, weight: Tensor | None, generator: torch.Generator, metric: Metric
) -> RowSampler | None:
    """The row sampler of a product; None for forms of products that are not sampled.

    Args:
        node: a quantizable operation.
        weight: its right operand where it is a constant, else None.
        generator: draws the random numbers.
        metric: metric of the search that uses the rows.
    """
    kind = op_kind(node)
    lhs_shape = operand(node, 0).meta["val"].shape
    if kind is OpKind.MATMUL:
        rhs_shape = operand(node, 1).meta["val"].shape
        if len(lhs_shape) < 2 or len(rhs_shape) < 2:
            return None
        if not all(isinstance(size, int) for size in (*lhs_shape[-2:], *rhs_shape[-2:])):
            return None  # a matrix whose size changes with the batch
        return MatmulRowSampler((lhs_shape, rhs_shape), generator, metric)
    if weight is None or len(lhs_shape) < (weight.ndim if kind is OpKind.CONV else 2):
        return None
    if kind is OpKind.CONV:
        return ConvRowSampler(node, weight, generator, metric)
    return LinearRowSampler(weight, 1, generator, metric)


def _heads(lhs_shape: tuple[Any, ...], rhs_shape: tuple[Any, ...]) -> int:
    """Number of heads: the size of axis -3 where an axis of samples comes before it, else 1."""
    if max(len(lhs_shape), len(rhs_shape)) < 4:
        return 1
    sizes = [shape[-3] for shape in (lhs_shape, rhs_shape) if len(shape) > 2]
    fixed_sizes = [size for size in sizes if isinstance(size, int)]
    return max(fixed_sizes) if len(fixed_sizes) == len(sizes) else 1
