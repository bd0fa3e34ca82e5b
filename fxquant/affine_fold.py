"""Moves an affine map of channels out of a norm's output and into the linears that read it.

Before: ``y = xbar gamma + beta``, then ``W y + b`` in each linear
After:  ``y' = (y - shift) / divide = xbar gamma' + beta'``, then ``W' y' + b'``

``gamma' = gamma / divide``, ``beta' = (beta - shift) / divide``, ``W' = W diag(divide)``,
``b' = b + W shift`` (MPTQ-ViT's SQ-b; with other values RepQ-ViT, arXiv 2212.08254, eq. 8). The
function is unchanged for any ``divide`` above zero and any ``shift``, and nothing is added to the
run time but a bias where a linear had none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import PassError
from fxquant.graph import (
    MOVES,
    aten,
    constant,
    data_users,
    example_size,
    get_parameter,
    operand,
    replay,
)
from fxquant.rewrite import add_constant

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class Site:
    """A norm whose output reaches linears alone, its channels in order on their last axis.

    Attributes:
        norm: a layer norm or an rms norm with a constant weight ``(C,)``.
        linears: all that reads the norm, data movement looked through; constant weights
            ``(out, C)``.
        shiftable: whether the fold may shift. Not where zeros are padded in between, which would
            have to become ``-shift / divide``; nor at an rms norm, which adds no ``beta``.
    """

    norm: fx.Node
    linears: tuple[fx.Node, ...]
    shiftable: bool


def find_sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Site | str]]:
    """Each norm that feeds a linear: its site, or a clause saying why the fold is not exact."""
    for norm in list(gm.graph.nodes):
        if norm.target in _NORMS:
            readers = _readers(norm)
            if any(reader.target is aten.linear.default for reader, _ in readers):
                yield norm, _site(gm, norm, readers)


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
    norm = site.norm
    gamma = get_parameter(gm, operand(norm, 2))
    _check(site, gamma.shape, divide, shift)
    divide, shift = divide.to(gamma.device).double(), shift.to(gamma.device).double()
    moves = bool(shift.any())
    old_beta = norm.args[3] if norm.target is aten.layer_norm.default and norm.args[3:] else None
    beta = constant(gm, old_beta)
    with gm.graph.inserting_before(norm):
        parts: list[Any] = [_replace(gm, norm, "weight", gamma.double() / divide, gamma)]
        if moves or beta is not None:
            start = 0.0 if beta is None else beta.double()
            parts.append(_replace(gm, norm, "bias", (start - shift) / divide, gamma))
    norm.args = (*norm.args[:2], *parts, *norm.args[2 + len(parts) :])
    for linear in site.linears:
        weight, bias = get_parameter(gm, operand(linear, 1)), constant(gm, _bias(linear))
        with gm.graph.inserting_before(linear):
            parts = [_replace(gm, linear, "weight", weight.double() * divide, weight)]
            if moves:
                added = weight.double() @ shift
                total = added if bias is None else bias.double() + added
                parts.append(_replace(gm, linear, "bias", total, weight))
        linear.args = (linear.args[0], *parts, *linear.args[1 + len(parts) :])


def _check(site: Site, shape: torch.Size, divide: Tensor, shift: Tensor) -> None:
    for name, value in (("divide", divide), ("shift", shift)):
        if value.shape != shape or not bool(torch.isfinite(value).all()):
            raise PassError(
                f"{site.norm.name}: {name} must be {tuple(shape)} finite numbers, one a channel, "
                f"got shape {tuple(value.shape)}"
            )
    if not bool((divide > 0).all()):
        raise PassError(f"{site.norm.name}: every channel must be divided by a number above zero")
    if not site.shiftable and bool(shift.any()):
        raise PassError(f"{site.norm.name} cannot be shifted; pass zeros where not site.shiftable")


def _replace(gm: fx.GraphModule, node: fx.Node, what: str, value: Tensor, like: Tensor) -> fx.Node:
    return add_constant(gm, value.to(like.dtype), f"{node.name}_{what}", like=node)


def _bias(linear: fx.Node) -> Any:
    return linear.args[2] if len(linear.args) > 2 else None


def _readers(norm: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """All that reads a norm's values, moves looked through, each with the node it reads."""
    pending, found = [norm], []
    for node in pending:
        for user in data_users(node):
            if user.target in MOVES:
                pending.append(user)
            else:
                found.append((user, node))
    return found


def _site(gm: fx.GraphModule, norm: fx.Node, readers: list[tuple[fx.Node, fx.Node]]) -> Site | str:
    reason = _norm_refusal(gm, norm)
    if reason:
        return reason
    shape = [int(example_size(size)) for size in norm.meta["val"].shape]
    # Channels count from one, so that zero is what was padded.
    numbers = torch.arange(1.0, shape[-1] + 1, dtype=torch.float64)
    memo: dict[fx.Node, Any] = {}
    padded = False
    for reader, source in readers:
        reason = _reader_refusal(gm, reader)
        if reason:
            return reason
        seen = replay(source, norm, numbers.expand(shape), memo)
        if seen.shape[-1] != shape[-1] or bool(((seen != numbers) & (seen != 0)).any()):
            return f"its channels do not stay in order on the last axis on their way to {reader}"
        padded |= bool((seen == 0).any())
    shiftable = norm.target is aten.layer_norm.default and not padded
    return Site(norm, tuple(reader for reader, _ in readers), shiftable)


def _norm_refusal(gm: fx.GraphModule, norm: fx.Node) -> str | None:
    axes = norm.args[1]
    if isinstance(axes, list | tuple) and len(axes) != 1:
        return f"it normalises over {len(axes)} axes, and a linear reads one"
    given = norm.args[2:4] if norm.target is aten.layer_norm.default else norm.args[2:3]
    if not given or given[0] is None:
        return "it has no weight to fold into"
    if any(value is not None and constant(gm, value) is None for value in given):
        return "its weight or bias is computed"
    return None


def _reader_refusal(gm: fx.GraphModule, reader: fx.Node) -> str | None:
    if reader.op == "output":
        return "the model outputs it too"
    if reader.target is not aten.linear.default:
        kind = str(getattr(reader.target, "__name__", reader.target)).split(".")[0]
        return f"{reader} ({kind}) reads it too, which is no linear"
    bias = _bias(reader)
    if constant(gm, reader.args[1]) is None or (bias is not None and constant(gm, bias) is None):
        return f"the weight or bias of {reader} is computed"
    return None
