"""Folds an affine map of channels into a norm or linear and into the linears that read it.

Before: ``y = xbar gamma + beta``, then ``W y + b`` in each linear
After:  ``y' = (y - shift) / divide = xbar gamma' + beta'``, then ``W' y' + b'``

``gamma' = gamma / divide``, ``beta' = (beta - shift) / divide``, ``W' = W diag(divide)``,
``b' = b + W shift`` (MPTQ-ViT's SQ-b, arXiv 2401.14895; with other values RepQ-ViT, arXiv
2212.08254, eq. 8). Where the source is a linear, its rows take the place of gamma. The function is
unchanged for any ``divide`` above zero and any ``shift``; the run time grows by a bias at most,
where a linear had none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import PassError
from fxquant.graph.dialect import aten
from fxquant.graph.nodes import constant, get_parameter, operand
from fxquant.graph.products import Product
from fxquant.graph.rewrite import add_constant
from fxquant.smoothing.fold_sites import Site, added_bias


@torch.no_grad()
def fold(gm: fx.GraphModule, site: Site, divide: Tensor, shift: Tensor) -> None:
    """Folds ``(y - shift) / divide`` into a site; the function of the graph is unchanged.

    Parameters are replaced and never written to, since other nodes may share them. New parameters
    are computed in double precision and stored in the precision of the old ones.

    Args:
        gm: edited in place; the caller removes dead parameters.
        site: a site of this graph.
        divide: ``(C,)``, above zero.
        shift: ``(C,)``; zero where ``site`` is not shiftable.

    Raises:
        PassError: ``divide`` or ``shift`` has another shape or a value that is not allowed.
    """
    source = site.source
    weight = get_parameter(gm, operand(source, _weight_index(source)))
    _check(site, weight.shape[:1], divide, shift)
    divide, shift = divide.to(weight.device).double(), shift.to(weight.device).double()
    bias = constant(gm, added_bias(source))
    rows = divide.view(-1, *[1] * (weight.ndim - 1))
    old_bias = 0.0 if bias is None else bias.double()
    new_bias = (old_bias - shift) / divide if bias is not None or bool(shift.any()) else None
    _replace(gm, source, weight.double() / rows, new_bias)
    for linear in site.linears:
        weight, bias = Product(gm, linear).weight, Product(gm, linear).bias
        new_bias = None
        if bool(shift.any()):
            new_bias = weight.double() @ shift + (0.0 if bias is None else bias.double())
        _replace(gm, linear, weight.double() * divide, new_bias)


def _weight_index(node: fx.Node) -> int:
    """Position of the weight among the arguments; the bias is the next argument."""
    return 1 if node.target is aten.linear.default else 2


def _replace(gm: fx.GraphModule, node: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
    """Replaces the parameters of a norm or linear, in the precision of the old weight."""
    index = _weight_index(node)
    dtype = get_parameter(gm, operand(node, index)).dtype
    with gm.graph.inserting_before(node):
        parameters: list[Any] = [
            add_constant(gm, value.to(dtype), f"{node.name}_{name}", like=node)
            for name, value in (("weight", weight), ("bias", bias))
            if value is not None
        ]
    node.args = (*node.args[:index], *parameters, *node.args[index + len(parameters) :])


def _check(site: Site, shape: torch.Size, divide: Tensor, shift: Tensor) -> None:
    where = site.source.name
    for name, value in (("divide", divide), ("shift", shift)):
        if value.shape != shape or not bool(torch.isfinite(value).all()):
            raise PassError(
                f"{where}: {name} must be {tuple(shape)} finite numbers, one a channel, "
                f"got shape {tuple(value.shape)}",
                edge=where,
                got=tuple(value.shape),
                expected=tuple(shape),
            )
    if not bool((divide > 0).all()):
        raise PassError(
            f"{where}: every channel must be divided by a number above zero",
            edge=where,
            got=divide,
            expected="> 0",
        )
    if not site.shiftable and bool(shift.any()):
        raise PassError(
            f"{where} cannot be shifted; pass zeros where not site.shiftable",
            edge=where,
            got=shift,
            expected="zeros",
        )
