"""Shifts the channels of keys and values so that each lies around zero.

Before: ``softmax(q k^T) v W^T + b``
After:  ``softmax(q (k - c)^T) (v - d) W^T + (b + W d)``

``c`` and ``d`` are the middles of the channels' ranges. They are folded into the biases of the
linears that compute keys and values, which costs nothing at run time beyond a bias where a linear
had none. Softmax is the same, since ``q c`` is one number for a whole row of scores; rows of
attention sum to one, so that the output projection's bias adds ``W d`` again. Keys and values are
the right operands of attention products, which integer kernels take symmetric around zero: a
channel far from zero costs all channels of its head resolution. Keys behind a rotary embedding or a
norm stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.products import Product
from fxquant.graph.rewrite import set_bias
from fxquant.passes.base import PassResult, Refusal, skipped
from fxquant.rotation.key_sites import key_sites
from fxquant.smoothing.affine_fold import fold
from fxquant.smoothing.channel_ranges import ChannelRanges, measure_ranges
from fxquant.smoothing.fold_sites import Site, linear_sites


@dataclass(frozen=True)
class CentreHeads:
    """Centres every channel of keys and of values.

    Attributes:
        ranges: smallest and largest values ``(C,)`` of each linear of keys or values, by its name;
            from :func:`fxquant.passes.centre_heads.head_ranges` on this graph.
    """

    ranges: ChannelRanges
    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Centres at each attention product."""
        changed, notes = 0, []
        for product, linear in list(key_sites(gm)):
            middle = linear if isinstance(linear, Refusal) else self._middle(linear)
            if isinstance(linear, Refusal) or isinstance(middle, Refusal):
                notes.append(skipped(product.name, f"its keys are not centred: {middle}"))
                continue
            bias = Product(gm, linear).bias
            centred = (0.0 if bias is None else bias.double()) - middle
            set_bias(gm, linear, centred.to(Product(gm, linear).weight.dtype))
            changed += 1
        for linear, site in list(value_sites(gm)):
            middle = site if isinstance(site, Refusal) else self._middle(linear)
            if isinstance(site, Refusal) or isinstance(middle, Refusal):
                notes.append(skipped(linear.name, f"its values are not centred: {middle}"))
                continue
            fold(gm, site, torch.ones_like(middle), middle)
            changed += 1
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        return PassResult(changed, tuple(notes))

    def _middle(self, linear: fx.Node) -> Tensor | Refusal:
        """Middles of the ranges of a linear's output channels, ``(C,)`` in float64."""
        if linear.name not in self.ranges:
            return Refusal("its ranges were not measured")
        lo, hi = self.ranges[linear.name]
        return (lo.double() + hi.double()) / 2


def value_sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Site | Refusal]]:
    """Each linear of attention values, with its site or the reason why it cannot be shifted."""
    for linear, site in linear_sites(gm):
        if isinstance(site, Site) and site.products:
            yield linear, site if site.shiftable else Refusal("rows of attention do not sum to one")


def head_ranges(gm: fx.GraphModule, batches: Iterable[Tensor]) -> ChannelRanges:
    """Measures the range of each channel of keys and values that :class:`CentreHeads` can shift.

    Args:
        gm: in stage FLOAT, not changed.
        batches: images ``(B, …)`` each, moved to the device of the graph.

    Returns:
        ``(lo, hi)`` by name of the linear that computes the keys or values, on the graph's device.

    Raises:
        BatchError: the model does not run on the images.
        CalibrationError: there are no images.
        NonFiniteError: keys or values hold NaN or infinity.
        PassError: the graph is in another stage.
    """
    keys = [linear for _, linear in key_sites(gm) if isinstance(linear, fx.Node)]
    values = [site.source for _, site in value_sites(gm) if isinstance(site, Site)]
    return measure_ranges(gm, batches, {node: [node] for node in (*keys, *values)})
