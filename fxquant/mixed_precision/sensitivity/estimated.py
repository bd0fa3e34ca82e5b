"""The loss of a group at a width, estimated without running the network.

Let ``e`` be the error of the quantized group in the output O of a product that reads the group: the
loss rises by about ``0.5 sum (dL/dO)^2 e^2``: half the metric ``fisher`` or ``hessian`` of
:func:`fxquant.search.metrics.losses`, on the sampled rows, scaled to all rows of an image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxquant.config.scale_search import Metric
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.graph.edges import Edge
from fxquant.graph.nodes import get_parameter
from fxquant.graph.shapes import example_batch, example_shape
from fxquant.mixed_precision.sensitivity.groups import EdgeGroup
from fxquant.mixed_precision.sensitivity.trial_quantizers import TrialQuantizers
from fxquant.quantizers import UniformQuantizer
from fxquant.search.metrics import Unit, losses
from fxquant.search.product_loss import ProductSample


class Estimates:
    """Estimates for the groups of an observed graph.

    Args:
        gm: in stage OBSERVED.
        trials: quantizers of the graph at any width.
        samples: rows of each product by node name, with gradients.
        metric: ``fisher`` or ``hessian``, the metric that rows were sampled for.
        images: number of images that the rows were sampled from.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        trials: TrialQuantizers,
        samples: dict[str, ProductSample],
        metric: Metric,
        images: int,
    ) -> None:
        self._gm, self._trials, self._samples = gm, trials, samples
        self._metric, self._images = metric, images
        self._batch = example_batch(gm.graph)

    @torch.no_grad()
    def losses(self, group: EdgeGroup, widths: tuple[int, ...]) -> list[float] | None:
        """The estimate at each width; None where a product of the group was not sampled."""
        totals = [0.0] * len(widths)
        for edge in group.edges:
            sample = self._samples.get(edge.node.name)
            if sample is None:
                return None
            if sample.gradient is not None:  # otherwise the loss does not depend on the product
                for i, bits in enumerate(widths):
                    totals[i] += self._loss(edge, bits, sample)
        return totals

    def _loss(self, edge: Edge, bits: int, sample: ProductSample) -> float:
        quantizer = self._trials.quantizer(edge, bits)
        left, right = sample.lhs, sample.rhs
        if edge.arg is Arg.WEIGHT:
            weight = quantizer(get_parameter(self._gm, edge.source)).flatten(1)
            right = torch.unflatten(weight, 0, (sample.heads, -1)).transpose(1, 2).unsqueeze(0)
        elif edge.arg is Arg.RHS:
            right = quantizer(right)
        elif edge.kind is OpKind.CONV and edge.scale_axis is not None:
            assert isinstance(quantizer, UniformQuantizer)
            left = _by_channel(left, quantizer)
        else:
            left = quantizer(left)
        outputs = (left @ right).unsqueeze(2)
        metric = sample.metric(self._metric)
        loss = losses(outputs, sample.lhs @ sample.rhs, sample.gradient, metric, Unit.TENSOR)
        return float(loss) / 2 * self._scale(edge.node, sample)

    def _scale(self, node: fx.Node, sample: ProductSample) -> float:
        """Number of rows of one image that a row of the sample represents."""
        assert sample.gradient is not None
        samples, heads, rows, columns = sample.gradient.shape
        sizes = example_shape(node)
        of_image = math.prod(sizes) / self._batch / (heads * columns)
        if sample.channels:  # one sample, of rows drawn from all
            drawn, share = rows, 1.0
        else:
            of_image /= sizes[-2]
            # Rows that the loss reaches are drawn first: if one of those drawn is not, all are.
            reached = bool((sample.gradient != 0).any(3).flatten(0, 1).any(0).all())
            drawn, share = samples, sizes[-2] / rows if reached else 1.0
        if sample.counts is not None:  # the gradient is scaled to the rows of all images
            return share / self._images
        return share * of_image / drawn


def _by_channel(patches: Tensor, quantizer: UniformQuantizer) -> Tensor:
    """Patches ``(1, groups, n, C / groups * taps)`` quantized with a scale for each channel."""
    taps = patches.shape[1] * patches.shape[3] // quantizer.scale.numel()
    apart = torch.unflatten(patches, 3, (-1, taps)).permute(0, 2, 4, 1, 3)
    channels = apart.flatten(3).flatten(0, 2)  # (n * taps, C)
    quantized: Tensor = quantizer(channels)
    return quantized.reshape(apart.shape).permute(0, 3, 1, 4, 2).flatten(3)
