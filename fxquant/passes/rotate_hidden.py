"""Rotates what linears read behind activation functions, at run time.

Before: ``y = W a + b`` with ``a = gelu(h)``, or another activation function, or its gated product
After:  ``y = (W H^T) z + b`` with ``z = H a``, ``H = diag(B, B, …)``

``B`` is a Hadamard matrix whose columns have random signs, divided by the root of its size. No
weight before an activation function can take up a rotation behind the function: one float linear of
the block's size is added, as QuaRot does for the same input (arXiv 2404.00456, section 4.2) with
one Hadamard matrix over all channels. ``z`` has no outlying channel, and its values are spread on
both sides of zero, where those of GELU lie on one side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.validation import check_number, check_seed, check_whole
from fxquant.config.vocabulary import OpKind, Stage
from fxquant.errors import PolicyError
from fxquant.graph.dialect import aten, elementwise_kind, op_kind
from fxquant.graph.macs import MacCounter
from fxquant.graph.meta import KEPT_FLOAT
from fxquant.graph.nodes import operand, skip_data_movement
from fxquant.graph.products import Product
from fxquant.graph.rewrite import add_constant, emit, replace_constant
from fxquant.passes.base import PassResult, Refusal, claim_rotation, skipped
from fxquant.rotation.orthogonal import signed_hadamard

_SMALLEST_BLOCK = 8
_COMPUTED = "its input is not rotated: its weight is computed at run time"
_REASON = "left float: it rotates the input of the next linear"


@dataclass(frozen=True)
class RotateHidden:
    """Rotates the input of each linear behind an activation function.

    Attributes:
        seed: seed of the signs.
        block: largest size of the blocks; a block has the largest power of two that divides the
            number of channels. A power of two, at least 8.
        max_overhead: largest number of multiplications of all added linears, as a share of the
            network's; blocks are made smaller to meet it.
    """

    seed: int = 0
    block: int = 64
    max_overhead: float = 0.06
    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            PolicyError: an option is out of its range.
        """
        check_seed(self)
        check_number(self, "max_overhead", (0.0, 100.0))
        check_whole(self, "block", _SMALLEST_BLOCK)
        if self.block & (self.block - 1):
            raise PolicyError(
                f"block must be a power of two, got {self.block}",
                got=self.block,
                expected="a power of two",
            )

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rotates each input once; a second run changes nothing."""
        if not claim_rotation(gm, self):
            return PassResult(0)
        counter, changed, notes = MacCounter(gm), 0, []
        readers: dict[fx.Node, list[fx.Node]] = {}  # linears by the value that they read
        for node in gm.graph.nodes:
            if _is_behind_activation(node):
                readers.setdefault(operand(node, 0), []).append(node)
        values, block = sum(map(counter.values, readers)), self.block
        while values * block > self.max_overhead * counter.total:
            block //= 2
        for i, (source, linears) in enumerate(readers.items()):
            fixed = [node for node in linears if Product(gm, node).has_constant_weight]
            notes += [skipped(node.name, _COMPUTED) for node in linears if node not in fixed]
            size = _block_size(source, block)
            if isinstance(size, Refusal):
                reason = f"its input is not rotated: {size}"
                notes += [skipped(node.name, reason) for node in fixed]
            elif fixed:
                _rotate(gm, source, fixed, signed_hadamard(size, self.seed + 1000 * i))
                changed += len(fixed)
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        return PassResult(changed, tuple(notes))


def _is_behind_activation(node: fx.Node) -> bool:
    """Whether a node is a linear that reads an activation function, or a product with one."""
    if op_kind(node) is not OpKind.LINEAR:
        return False
    source = skip_data_movement(operand(node, 0))
    factors = source.all_input_nodes if source.target is aten.mul.Tensor else [source]
    return any(elementwise_kind(skip_data_movement(f)) is OpKind.ACTIVATION for f in factors)


def _block_size(source: fx.Node, largest: int) -> int | Refusal:
    """Size of the blocks of a value's channels, or the reason why there are none."""
    value = source.meta["val"]
    if sum(not isinstance(size, int) for size in value.shape) > 1:
        return Refusal("several axes have sizes that depend on the batch")
    channels = int(value.shape[-1])
    size = min(channels & -channels, largest)  # the largest power of two that divides both
    if size < _SMALLEST_BLOCK:
        return Refusal(
            f"blocks of {channels} channels within max_overhead have {size}, and at least "
            f"{_SMALLEST_BLOCK} are needed"
        )
    return size


def _rotate(gm: fx.GraphModule, source: fx.Node, linears: list[fx.Node], matrix: Tensor) -> None:
    """Rotates a value once for all of the linears that read it."""
    first, size = linears[0], len(matrix)
    *lead, channels = (n if isinstance(n, int) else -1 for n in source.meta["val"].shape)
    with gm.graph.inserting_before(first):
        cut = [*lead, channels // size, size]
        blocks = emit(gm, aten.reshape.default, source, cut, like=first)
        values = matrix.to(Product(gm, first).weight)
        constant = add_constant(gm, values, f"{first.name}_rotation", like=first)
        rotated = emit(gm, aten.linear.default, blocks, constant, like=first)
        rotated._rename(f"{first.name}_rotated")
        KEPT_FLOAT.set(rotated, _REASON)
        joined = emit(gm, aten.reshape.default, rotated, [*lead, channels], like=first)
    for node in linears:
        product = Product(gm, node)
        weight = product.weight
        columns = weight.double().reshape(len(weight), -1, size) @ matrix.to(weight.device).T
        turned = columns.flatten(1).to(weight.dtype)
        replace_constant(gm, node, product.weight_node, turned, f"{node.name}_weight")
        node.replace_input_with(source, joined)
