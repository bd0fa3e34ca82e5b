"""Samples rows of every product of the float model, with the gradient of a loss.

Every batch runs forward once and, where gradients are needed, backward once. Rows are sampled
without replacement: memory depends on the budget, not on the number of images.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibration.input_errors import errors_as_input_error
from fxquant.calibration.output_loss import OutputLoss
from fxquant.calibration.row_samplers import RowSampler, row_sampler
from fxquant.calibration.user_loss import Loss, check_scalar_loss, errors_as_user_loss
from fxquant.config.scale_search import GRADIENT_METRICS, ScaleSearch
from fxquant.errors import CalibrationError
from fxquant.graph.capture import device_of
from fxquant.graph.dialect import op_kind
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.graph.meta import EMBEDDINGS, QUANT_SPECS
from fxquant.graph.nodes import constant, operand
from fxquant.search.product_loss import ProductSample

# Images in one backward pass: the memory of autograd grows with their number.
_BACKWARD_BATCH = 4
# Rows are weighted by squares of gradients times squared errors, which must fit float32 (to 1e38).
_LARGEST_GRADIENT = 1e15
# Smallest number of rows that represents a product.
_MIN_ROWS = 16


class ProductSampler:
    """Samples rows of the products of a graph, batch by batch.

    Observers in the graph see every batch as well.

    Args:
        gm: a graph without quantizers.
        search: number of rows, loss of the gradient, and seed.
        loss: loss of outputs and labels, instead of the loss that ``search`` names.

    Raises:
        CalibrationError: the memory budget is too small.
    """

    def __init__(self, gm: fx.GraphModule, search: ScaleSearch, loss: Loss | None = None) -> None:
        self._gm, self._loss, self._device = gm, loss, device_of(gm)
        self._samplers = _samplers(gm, search, torch.Generator().manual_seed(search.seed))
        self._backward: _Backward | None = None
        if search.metric in GRADIENT_METRICS:
            embeddings = EMBEDDINGS.get(gm)
            self._backward = _Backward(
                loss, OutputLoss(search.loss, search.seed, self._device, embeddings)
            )
        self._images, self._reached = 0, False

    def observe(self, images: Tensor, labels: Tensor | None) -> None:
        """Runs the graph on a batch and samples its rows.

        Args:
            images: ``(B, …)``, moved to the device of the graph a few at a time.
            labels: ``(B, …)``, or None.

        Raises:
            BatchError: the model does not accept the images.
            CalibrationError: the loss raises an error, or its gradient is missing or not finite.
            NonFiniteError: an activation holds NaN or infinity.
        """
        count = math.ceil(len(images) / _BACKWARD_BATCH)
        label_pieces = [None] * count if labels is None else labels.tensor_split(count)
        for piece, piece_labels in zip(images.tensor_split(count), label_pieces, strict=True):
            _run(self._gm, self._samplers, piece.to(self._device), piece_labels, self._backward)
            samplers = self._samplers.values()
            self._reached = self._reached or any(sampler.reached for sampler in samplers)
        self._images += len(images)

    def samples(self) -> dict[str, ProductSample]:
        """The sampled rows by node name.

        Raises:
            CalibrationError: the gradient of the user's loss is zero at all products.
        """
        samplers, images = self._samplers, self._images
        weighted = self._loss is not None and self._backward is not None
        if weighted and samplers and images and not self._reached:
            raise CalibrationError(
                f"the gradient of the loss given to compile() is zero at all {len(samplers)} "
                f"products, for all {images} images (or its square is, in float32), and cannot "
                "weight errors: compute the loss from the model's outputs, without detach() and "
                "without a constant instead of them"
            )
        return {name: sampler.sample() for name, sampler in samplers.items() if sampler.filled}


def _samplers(
    gm: fx.GraphModule, search: ScaleSearch, generator: torch.Generator
) -> dict[str, RowSampler]:
    """Row samplers of all products with a quantized operand, within the memory budget."""
    samplers = {}
    for node in gm.graph.nodes:
        if op_kind(node) is None or not QUANT_SPECS.get(node):
            continue
        sampler = row_sampler(node, constant(gm, operand(node, 1)), generator, search.metric)
        if sampler is not None:
            samplers[node.name] = sampler

    def total_bytes(rows: int) -> int:
        return sum(sampler.bytes_for(rows) for sampler in samplers.values())

    fewest = min(_MIN_ROWS, search.rows)
    if total_bytes(fewest) > search.memory_bytes:
        raise CalibrationError(
            f"memory_bytes is {search.memory_bytes:,}, and {fewest} rows of each product need "
            f"{total_bytes(fewest):,}: raise it in the policy's search",
            got=search.memory_bytes,
            expected=f">= {total_bytes(fewest)}",
        )
    possible = range(search.rows + 1)
    rows = bisect_right(possible, search.memory_bytes, lo=fewest, key=total_bytes) - 1
    for sampler in samplers.values():
        sampler.set_limit(rows)
    return samplers


class _Backward:
    """The backward pass of the user's loss or, without one, of the search's loss.

    Args:
        loss: the user's loss.
        search_loss: the loss of the search.
    """

    def __init__(self, loss: Loss | None, search_loss: OutputLoss) -> None:
        self._loss, self._search_loss = loss, search_loss

    def __call__(self, outputs: Any, labels: Tensor | None) -> None:
        """Computes the loss and its gradients.

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
    samplers: dict[str, RowSampler],
    images: Tensor,
    labels: Tensor | None,
    backward: _Backward | None,
) -> None:
    with torch.set_grad_enabled(backward is not None):
        if backward is not None:
            # Some models change their input in place, which a leaf forbids and its copy allows.
            images = images.clone().requires_grad_().clone()
        with errors_as_input_error(images):
            outputs = _Recorder(gm, samplers).run(images)
        if backward is not None:
            backward(outputs, None if labels is None else labels.to(images.device))
            _check_gradients(samplers)
    for sampler in samplers.values():
        sampler.commit()


def _check_gradients(samplers: dict[str, RowSampler]) -> None:
    for name, sampler in samplers.items():
        largest = sampler.largest_gradient
        if not largest <= _LARGEST_GRADIENT:  # also true of NaN
            raise CalibrationError(
                f"the gradient of the loss at product {name} reaches {largest:.1e} "
                f"in a batch, and must be finite and at most {_LARGEST_GRADIENT:.0e}, so that its "
                "square can weight errors: divide the loss by a constant, or look for a root, "
                "logarithm or division at zero in the loss or the model",
                edge=name,
                got=largest,
                expected=f"<= {_LARGEST_GRADIENT:g}",
            )


class _Recorder(GraphInterpreter):
    """Runs the graph and passes the operands and outputs of its products to the row samplers."""

    def __init__(self, gm: fx.GraphModule, samplers: dict[str, RowSampler]) -> None:
        super().__init__(gm)
        self._samplers = samplers

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node; its row sampler observes the operands and the result."""
        result = super().run_node(n)
        sampler = self._samplers.get(n.name)
        if sampler is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            sampler.observe(args[0].detach(), args[1].detach(), result)
        return result
