"""A single pass over the calibration images, for observers, row samplers and the reservoir."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxquant.calibration.input_errors import errors_as_input_error
from fxquant.calibration.reservoir import ReservoirSampler
from fxquant.calibration.sample_products import ProductSampler
from fxquant.calibration.user_loss import Loss
from fxquant.config.scale_search import ScaleSearch
from fxquant.config.vocabulary import Stage
from fxquant.errors import PassError
from fxquant.graph.capture import device_of
from fxquant.graph.nodes import stage
from fxquant.search.product_loss import ProductSample


@dataclass(frozen=True)
class Observed:
    """The result of a pass over the images.

    Attributes:
        images: number of images.
        samples: rows of each product by node name; empty where no rows were asked for.
    """

    images: int
    samples: dict[str, ProductSample] = field(repr=False)


def observe(
    gm: fx.GraphModule,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    search: ScaleSearch | None = None,
    loss: Loss | None = None,
    reservoir: ReservoirSampler | None = None,
    samples: dict[str, ProductSample] | None = None,
) -> Observed:
    """Runs the graph and its observers on all batches, and samples rows and images where asked.

    Args:
        gm: a graph in stage OBSERVED; or, where rows are sampled, in any stage before quantizers.
        batches: images ``(B, …)`` with labels, moved to the device of the graph.
        search: number of rows to sample of each product, and the loss of their gradient; None
            samples no rows.
        loss: loss of outputs and labels, instead of the loss that ``search`` names.
        reservoir: keeps some of the images.
        samples: rows of an earlier pass; where there are any, no rows are sampled again.

    Raises:
        BatchError: the model does not take the images.
        CalibrationError: the memory budget of the search is too small; or the loss raises an
            error, or its gradient is missing, not finite, or zero at all products.
        NonFiniteError: an activation holds NaN or infinity.
        PassError: nothing would be observed: no rows are sampled, and the stage is not OBSERVED.
    """
    earlier_samples = samples or {}
    sampler = None if search is None or earlier_samples else ProductSampler(gm, search, loss)
    if sampler is None and stage(gm) is not Stage.OBSERVED:
        raise PassError(
            f"observe requires stage OBSERVED, got {stage(gm).name}",
            got=stage(gm),
            expected=Stage.OBSERVED,
        )
    device, count = device_of(gm), 0
    for images, labels in batches if reservoir is None else reservoir.observe(batches):
        if sampler is not None:
            sampler.observe(images, labels)
        else:
            with torch.no_grad(), errors_as_input_error(images):
                gm(images.to(device))
        count += len(images)
    return Observed(count, earlier_samples if sampler is None else sampler.samples())
