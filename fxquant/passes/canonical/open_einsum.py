"""Rewrites an einsum of two operands as a matmul.

Before: ``y = einsum("bhid,bhjd->bhij", a, b)``
After:  ``y = a @ permute(b)``

Letters fall in four groups: batch (in both operands and the result), summed (in both operands
alone), left (in the left operand and the result) and right (in the right operand and the result).
The left operand is permuted to ``(batch, left, summed)``, the right one to ``(batch, summed,
right)``; groups are flattened, and the product is permuted to the order of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import SymInt, fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.dialect import aten
from fxquant.graph.rewrite import emit
from fxquant.passes.base import Note, NoteKind, PassResult, Refusal

_Call = Callable[..., fx.Node]


@dataclass(frozen=True)
class _Plan:
    """The letters of an einsum by group, each in order."""

    left_letters: str
    right_letters: str
    result: str
    batch: str
    summed: str
    left: str
    right: str


def _plan(equation: str, operands: int) -> _Plan | Refusal:
    """The groups, or the reason why the equation is not a matmul."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if operands != 2 or len(terms) != 2 or not arrow or "." in equation:
        return Refusal(
            "an einsum of other than two operands, or with an ellipsis, is not a matrix product"
        )
    a, b = terms
    if any(len(set(term)) != len(term) for term in (a, b, result)):
        return Refusal("an einsum that repeats a letter in one operand is not a matrix product")
    if any(letter not in result and letter not in b for letter in a) or any(
        letter not in result and letter not in a for letter in b
    ):
        return Refusal("an einsum that sums an axis of one operand alone is not a matrix product")
    summed = "".join(letter for letter in a if letter in b and letter not in result)
    if not summed:
        return Refusal("an einsum that sums over nothing is not a matrix product")
    return _Plan(
        left_letters=a,
        right_letters=b,
        result=result,
        batch="".join(letter for letter in a if letter in b and letter in result),
        summed=summed,
        left="".join(letter for letter in a if letter not in b),
        right="".join(letter for letter in b if letter not in a),
    )


def _sizes(call: _Call, node: fx.Node, letters: str) -> dict[str, Any]:
    """Size of each axis: a number, or a node where it is symbolic."""
    return {
        letter: call(aten.sym_size.int, node, axis) if isinstance(size, SymInt) else int(size)
        for axis, (letter, size) in enumerate(zip(letters, node.meta["val"].shape, strict=True))
    }


def _flat(sizes: dict[str, Any], group: str) -> Any:
    """Size of a flattened group: a product, the size itself, or -1 with a symbolic factor."""
    if len(group) == 1:
        return sizes[group]
    known = [sizes[letter] for letter in group]
    return -1 if any(isinstance(size, fx.Node) for size in known) else math.prod(known)


def _operand(
    call: _Call, node: fx.Node, letters: str, sizes: dict[str, Any], groups: tuple[str, str, str]
) -> fx.Node:
    """An operand as ``(*batch, first group, second group)``."""
    order = [letters.index(letter) for letter in "".join(groups)]
    if order != list(range(len(order))):
        node = call(aten.permute.default, node, order)
    batch, first, second = groups
    if len(first) == len(second) == 1:
        return node
    shape = [*(sizes[letter] for letter in batch), _flat(sizes, first), _flat(sizes, second)]
    return call(aten.reshape.default, node, shape)


def _rewrite(gm: fx.GraphModule, node: fx.Node, plan: _Plan) -> fx.Node:
    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        return emit(gm, target, *args, like=node)

    a, b = node.all_input_nodes if len(node.all_input_nodes) == 2 else node.all_input_nodes * 2
    sizes = {**_sizes(call, b, plan.right_letters), **_sizes(call, a, plan.left_letters)}
    lhs = _operand(call, a, plan.left_letters, sizes, (plan.batch, plan.left, plan.summed))
    rhs = _operand(call, b, plan.right_letters, sizes, (plan.batch, plan.summed, plan.right))
    product = call(aten.matmul.default, lhs, rhs)
    letters = plan.batch + plan.left + plan.right
    if len(plan.left) != 1 or len(plan.right) != 1:
        product = call(aten.reshape.default, product, [sizes[letter] for letter in letters])
    order = [letters.index(letter) for letter in plan.result]
    if order == list(range(len(order))):
        return product
    return call(aten.permute.default, product, order)


@dataclass(frozen=True)
class OpenEinsum:
    """Rewrites einsums of two operands as matmuls."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rewrites every einsum that is a matrix product."""
        changed, notes = 0, []
        for node in [n for n in gm.graph.nodes if n.target is aten.einsum.default]:
            plan = _plan(str(node.args[0]), len(node.args[1]))
            if isinstance(plan, Refusal):
                notes.append(Note(NoteKind.UNSUPPORTED, node.name, f"left float: {plan}"))
                continue
            with gm.graph.inserting_before(node):
                new = _rewrite(gm, node, plan)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            changed += 1
        return PassResult(changed, tuple(notes))
