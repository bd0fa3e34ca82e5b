"""Table of scale searches: the search of each kind of quantizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.config.scale_search import ScaleSearch
from fxquant.config.spec import Granularity, TensorSpec
from fxquant.quantizers import (
    DynamicFocusingQuantizer,
    LogQuantizer,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
    entry_for,
)
from fxquant.search.candidate_rows import SearchedRows
from fxquant.search.metrics import Unit, unit_shape
from fxquant.search.product_loss import ProductSample
from fxquant.search.region_ratio import SearchedRegionRatio
from fxquant.search.scales import Searched, SearchedTwin, SearchedUniform
from fxquant.utils.notes import Refusal

_REFUSAL_PREFIX = "its scale was not searched: "


@dataclass(frozen=True, kw_only=True)
class SearchSite:
    """Place of a quantizer in the network, as far as a search needs it.

    Attributes:
        spec: the annotation.
        samples: sampled rows of the products that read the quantizer, at least one product.
        left: whether the quantizer is on the left operand of these products.
        is_weight: whether the quantizer is on a weight.
        search: the grid and the metric.
    """

    spec: TensorSpec
    samples: Sequence[ProductSample]
    left: bool
    is_weight: bool
    search: ScaleSearch

    @property
    def values(self) -> Tensor:
        """Sampled values of the operand, as the first product reads it."""
        return self.samples[0].lhs if self.left else self.samples[0].rhs


def start_search(quantizer: Quantizer, site: SearchSite) -> Searched | Refusal:
    """The search of a quantizer, or a sentence on why it has none."""
    start = entry_for(SEARCHES, quantizer)
    if start is None:
        return Refusal(
            f"{_REFUSAL_PREFIX}no search for {type(quantizer).__name__} (scheme {site.spec.scheme})"
        )
    return start(quantizer, site)


def _uniform(quantizer: UniformQuantizer, site: SearchSite) -> SearchedUniform | Refusal:
    unit = _unit(quantizer, site)
    if unit is None:
        return Refusal(
            f"{_REFUSAL_PREFIX}no output depends on one scale per channel of an activation alone"
        )
    shape, *other_shapes = (unit_shape(unit, s.heads, s.columns) for s in site.samples)
    if any(other != shape for other in other_shapes) or (
        quantizer.scale.numel() != torch.Size(shape).numel()
    ):
        return Refusal(f"{_REFUSAL_PREFIX}its scales lie along no axis of the product")
    return SearchedUniform(quantizer, site.spec, unit, shape, site.search)


def _unit(quantizer: UniformQuantizer, site: SearchSite) -> Unit | None:
    """The unit that each scale acts on; None where no output depends on one scale alone."""
    if quantizer.axis is None:
        return Unit.TENSOR
    if site.is_weight:
        return Unit.COLUMN
    return Unit.HEAD if site.spec.granularity is Granularity.HEAD else None


def _twin(quantizer: TwinUniformQuantizer, site: SearchSite) -> Searched:
    search_class = SearchedRegionRatio if site.search.search_region_ratio else SearchedTwin
    return search_class(quantizer, site.spec, site.search, site.values)


def search_rows(quantizer: Quantizer, site: SearchSite) -> SearchedRows | Refusal:
    """The search of any scheme whose family has candidates, which have one scale for the tensor."""
    if quantizer.scale_axis is not None:
        return Refusal(f"{_REFUSAL_PREFIX}scheme {site.spec.scheme} is searched per tensor alone")
    return SearchedRows(quantizer, site.spec, site.search, site.values)


SEARCHES: dict[type[Quantizer], Callable[[Any, SearchSite], Searched | Refusal]] = {
    UniformQuantizer: _uniform,
    TwinUniformQuantizer: _twin,
    DynamicFocusingQuantizer: search_rows,
    LogQuantizer: search_rows,
}
