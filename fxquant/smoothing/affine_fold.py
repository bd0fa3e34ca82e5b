"""Moves an affine map of channels out of the output of a norm or linear into the linears behind it.

Before: ``y = xbar gamma + beta``, then ``W y + b`` in each linear
After:  ``y' = (y - shift) / divide = xbar gamma' + beta'``, then ``W' y' + b'``

``gamma' = gamma / divide``, ``beta' = (beta - shift) / divide``, ``W' = W diag(divide)``,
``b' = b + W shift`` (MPTQ-ViT's SQ-b, arXiv 2401.14895; with other values RepQ-ViT, arXiv
2212.08254, eq. 8). A linear in the place of the norm has its rows for gamma. The
function is unchanged for any ``divide`` above zero and any ``shift``, and nothing is added to the
run time but a bias where a linear had none.
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
    """Makes the linears of ``site`` read ``(y - shift) / divide``, the function unchanged.

    Parameters are replaced, never written to, so that others may share them. What is computed is
    computed in double precision and stored in the precision of the parameter.

    Args:
        gm: edited in place; dead parameters are left to the caller.
        site: of this graph.
        divide: ``(C,)``, above zero.
        shift: ``(C,)``; zero where ``site`` is not shiftable.

    Raises:
        PassError: ``divide`` or ``shift`` is not as stated.
    """
    source = site.source
    weight = get_parameter(gm, operand(source, _weight_index(source)))
    _check(site, weight.shape[:1], divide, shift)
    divide, shift = divide.to(weight.device).double(), shift.to(weight.device).double()
    bias = constant(gm, added_bias(source))
    rows = divide.view(-1, *[1] * (weight.ndim - 1))
    start = 0.0 if bias is None else bias.double()
    written = (start - shift) / divide if bias is not None or bool(shift.any()) else None
    _replace(gm, source, weight.double() / rows, written)
    for linear in site.linears:
        weight, bias = Product(gm, linear).weight, Product(gm, linear).bias
        added = None
        if bool(shift.any()):
            added = weight.double() @ shift + (0.0 if bias is None else bias.double())
        _replace(gm, linear, weight.double() * divide, added)


def _weight_index(node: fx.Node) -> int:
    """Position of the weight among the arguments; a bias stands behind it."""
    return 1 if node.target is aten.linear.default else 2


def _replace(gm: fx.GraphModule, node: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a norm or linear new parameters, in the precision of the old weight."""
    at = _weight_index(node)
    dtype = get_parameter(gm, operand(node, at)).dtype
    with gm.graph.inserting_before(node):
        parts: list[Any] = [
            add_constant(gm, value.to(dtype), f"{node.name}_{name}", like=node)
            for name, value in (("weight", weight), ("bias", bias))
            if value is not None
        ]
    node.args = (*node.args[:at], *parts, *node.args[at + len(parts) :])


def _check(site: Site, shape: torch.Size, divide: Tensor, shift: Tensor) -> None:
    where = site.source.name
    for name, value in (("divide", divide), ("shift", shift)):
        if value.shape != shape or not bool(torch.isfinite(value).all()):
            raise PassError(
                f"{where}: {name} must be {tuple(shape)} finite numbers, one a channel, "
                f"got shape {tuple(value.shape)}"
            )
    if not bool((divide > 0).all()):
        raise PassError(f"{where}: every channel must be divided by a number above zero")
    if not site.shiftable and bool(shift.any()):
        raise PassError(f"{where} cannot be shifted; pass zeros where not site.shiftable")
