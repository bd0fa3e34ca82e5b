"""Rows of every product, drawn from the float model, with the gradient of a loss behind them.

One forward and, where gradients are wanted, one backward pass a batch. Rows are sampled without
replacement, so that memory depends on the budget, not on the number of images.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibration.output_loss import OutputLoss
from fxquant.calibration.row_samplers import RowSampler, row_sampler
from fxquant.calibration.run_batches import errors_as_input_error
from fxquant.calibration.user_loss import Loss, check_scalar_loss, errors_as_user_loss
from fxquant.config.scale_search import GRADIENT_METRICS, ScaleSearch
from fxquant.errors import CalibrationError
from fxquant.graph.capture import device_of
from fxquant.graph.dialect import op_kind
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.graph.meta import QUANT_SPECS
from fxquant.graph.nodes import constant, operand
from fxquant.search.product_loss import ProductSample

# Images in one backward pass: what autograd keeps grows with them.
_PART = 4
# Rows are weighed by squares of gradients times squared errors, which float32 must hold (to 1e38).
_LARGEST_GRADIENT = 1e15
# Fewer rows than this say too little about a product.
_LEAST_ROWS = 16


class ProductSampler:
    """Samples rows of the products of a graph, batch by batch.

    Observers in the graph see every batch as well.

    Args:
        gm: before any quantizer stands in it.
        search: how many rows, which gradient, which seed.
        loss: of outputs and labels, instead of the one that ``search`` names.

    Raises:
        CalibrationError: the memory budget is too small.
    """

    def __init__(self, gm: fx.GraphModule, search: ScaleSearch, loss: Loss | None = None) -> None:
        self._gm, self._loss, self._device = gm, loss, device_of(gm)
        self._sites = _sites(gm, search, torch.Generator().manual_seed(search.seed))
        self._backward: _Backward | None = None
        if search.metric in GRADIENT_METRICS:
            self._backward = _Backward(loss, OutputLoss(search.loss, search.seed, self._device))
        self._images, self._reached = 0, False

    def observe(self, images: Tensor, labels: Tensor | None) -> None:
        """Runs the graph on a batch and samples its rows.

        Args:
            images: ``(B, …)``, moved to the device of the graph a few at a time.
            labels: with B entries, or None.

        Raises:
            BatchError: the model does not take the images.
            CalibrationError: the loss raises an error, or its gradient is missing or not finite.
            NonFiniteError: an activation holds NaN or infinity.
        """
        count = math.ceil(len(images) / _PART)
        label_parts = [None] * count if labels is None else labels.tensor_split(count)
        for part, its_labels in zip(images.tensor_split(count), label_parts, strict=True):
            _run(self._gm, self._sites, part.to(self._device), its_labels, self._backward)
            self._reached = self._reached or any(site.reached for site in self._sites.values())
        self._images += len(images)

    def samples(self) -> dict[str, ProductSample]:
        """The rows by node name.

        Raises:
            CalibrationError: the gradient of the user's loss is zero at all products.
        """
        sites, seen = self._sites, self._images
        weighted = self._loss is not None and self._backward is not None
        if weighted and sites and seen and not self._reached:
            raise CalibrationError(
                f"the gradient of the loss given to compile() is zero at all {len(sites)} "
                f"products, for all {seen} images (or its square is, in float32), so it weighs "
                "nothing: compute the loss from the model's outputs, without detach() or a "
                "constant in their place"
            )
        return {name: site.sample() for name, site in sites.items() if site.filled}


def _sites(
    gm: fx.GraphModule, search: ScaleSearch, generator: torch.Generator
) -> dict[str, RowSampler]:
    """One row sampler for each product with a quantized operand, within the memory budget."""
    samplers = {}
    for node in gm.graph.nodes:
        if op_kind(node) is None or not QUANT_SPECS.get(node):
            continue
        site = row_sampler(node, constant(gm, operand(node, 1)), generator, search.metric)
        if site is not None:
            samplers[node.name] = site

    def total(rows: int) -> int:
        return sum(site.bytes_for(rows) for site in samplers.values())

    least = min(_LEAST_ROWS, search.rows)
    if total(least) > search.memory_bytes:
        raise CalibrationError(
            f"memory_bytes is {search.memory_bytes:,}, and {least} rows of each product take "
            f"{total(least):,}: raise it in the policy's search"
        )
    rows = bisect_right(range(search.rows + 1), search.memory_bytes, lo=least, key=total) - 1
    for site in samplers.values():
        site.set_limit(rows)
    return samplers


class _Backward:
    """The backward pass from a loss: the user's, or else that of the search.

    Args:
        loss: the user's.
        search_loss: the loss of the search.
    """

    def __init__(self, loss: Loss | None, search_loss: OutputLoss) -> None:
        self._loss, self._search_loss = loss, search_loss

    def __call__(self, outputs: Any, labels: Tensor | None) -> None:
        """Runs it.

        Raises:
            CalibrationError: the user's loss raises an error, or a loss has no gradient.
        """
        if self._loss is None:
            value = self._search_loss(outputs)
            check_scalar_loss(value)
            value.backward()  # type: ignore[no-untyped-call]
            return
        with errors_as_user_loss(labels):
            value = self._loss(outputs, labels)
        check_scalar_loss(value)
        with errors_as_user_loss(labels, " in its backward pass"):
            value.backward()  # type: ignore[no-untyped-call]


def _run(
    gm: fx.GraphModule,
    sites: dict[str, RowSampler],
    images: Tensor,
    labels: Tensor | None,
    backward: _Backward | None,
) -> None:
    with torch.set_grad_enabled(backward is not None):
        if backward is not None:
            # A leaf may not be changed in place, as some models do with their input; its copy may.
            images = images.clone().requires_grad_().clone()
        with errors_as_input_error(images):
            outputs = _Recorder(gm, sites).run(images)
        if backward is not None:
            backward(outputs, None if labels is None else labels.to(images.device))
            _check_gradients(sites)
    for site in sites.values():
        site.merge()


def _check_gradients(sites: dict[str, RowSampler]) -> None:
    for name, site in sites.items():
        if not site.largest_gradient <= _LARGEST_GRADIENT:  # NaN is not
            raise CalibrationError(
                f"the gradient of the loss at product {name} reaches {site.largest_gradient:.1e} "
                f"in a batch, and must be finite and at most {_LARGEST_GRADIENT:.0e}, so that its "
                "square can weigh errors: divide the loss by a constant, or look for a root, "
                "logarithm or division at zero in the loss or the model"
            )


class _Recorder(GraphInterpreter):
    """Runs the graph and offers the operands and outputs of its products to the collectors."""

    def __init__(self, gm: fx.GraphModule, sites: dict[str, RowSampler]) -> None:
        super().__init__(gm)
        self._sites = sites

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        result = super().run_node(n)
        site = self._sites.get(n.name)
        if site is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            site.offer(args[0].detach(), args[1].detach(), result)
        return result
