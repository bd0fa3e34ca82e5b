"""Annotates edges from the rules of a policy.

Before: stage FLOAT
After:  stage ANNOTATED; ``node.meta["quant"]`` maps arguments to their TensorSpec,
        ``node.meta["pinned"]`` holds the arguments whose rule is pinned

The first matching rule decides. Edges that stay float are reported with the reason, and rules that
are never the first to match are reported too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import SymInt, Tensor, fx

from fxquant.config.spec import Granularity, ObserverKind, Scheme, TensorSpec
from fxquant.config.vocabulary import Arg, OpKind, Stage
from fxquant.errors import PolicyError, UnusedRuleError
from fxquant.graph.dialect import UNSUPPORTED
from fxquant.graph.edges import Edge, edges, fed_by, possible_edges
from fxquant.graph.masks import masked
from fxquant.graph.meta import KEPT_FLOAT, PINNED_ARGS, QUANT_SPECS
from fxquant.graph.nodes import constant, rank
from fxquant.graph.softmax import is_along_rows
from fxquant.passes.base import Note, NoteKind, PassResult
from fxquant.policies.policy import Rule

_MASKED_REASON = (
    "left float: its input may hold minus infinity, as attention masks do, and no integer code "
    "represents minus infinity; a mask of a finite number, such as -100, is quantized"
)


def _earlier(rules: set[int]) -> str:
    numbers = [str(i + 1) for i in sorted(rules)]
    return f"rule {numbers[0]}" if len(numbers) == 1 else f"rules {', '.join(numbers)}"


def _per_tensor_reason(edge: Edge, granularity: Granularity, value: Tensor) -> str:
    """The reason why an edge gets one scale although its rule asks for several; empty if none."""
    if granularity is Granularity.HEAD and (edge.kind is not OpKind.MATMUL or value.ndim < 4):
        return "per tensor: it has no (batch, head, token, channel) axes"
    axis = edge.axis_of(granularity)
    if axis is not None and isinstance(value.shape[axis], SymInt):
        return f"per tensor: the size of its {granularity} axis changes with the batch"
    return ""


def _check_scheme(edge: Edge, scheme: Scheme, hit: int) -> None:
    """Refuses a scheme that cannot represent the values of an edge.

    Args:
        edge: the edge.
        scheme: the scheme that the rule assigns to the edge.
        hit: index of the rule.

    Raises:
        PolicyError: the scheme is for other edges.
    """
    if edge.arg is Arg.WEIGHT:
        if scheme.limits.allows_weights:
            return
        raise PolicyError(
            f"{edge.name}: rule {hit + 1} gives a weight scheme {scheme}, which is for "
            "activations; add a rule with `arg: weight` before this rule, or `fed_by` to this rule",
            edge=edge.name,
            got=scheme,
        )
    if not edge.kind.is_product and not scheme.limits.allows_elementwise:
        raise PolicyError(
            f"{edge.name}: rule {hit + 1} gives the input of {edge.kind} scheme {scheme}, "
            "which is for inputs of products; use scheme uniform",
            edge=edge.name,
            got=scheme,
        )
    if scheme.limits.is_one_sided and edge.kind is OpKind.CONV:
        raise PolicyError(
            f"{edge.name}: rule {hit + 1} gives the input of a convolution scheme {scheme}, "
            "which is for inputs of linear and matmul; add `fed_by: softmax` to the rule, or use "
            "scheme uniform",
            edge=edge.name,
            got=scheme,
        )


def _is_last_axis_softmax(edge: Edge) -> bool:
    return edge.kind is OpKind.SOFTMAX and is_along_rows(edge.node)


@dataclass(frozen=True)
class AssignSpecs:
    """Annotates each edge with the spec of the first rule that matches it.

    Attributes:
        rules: in order of precedence.
    """

    rules: tuple[Rule, ...]
    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.ANNOTATED

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Annotates all edges that a rule quantizes.

        Raises:
            UnusedRuleError: a rule that is not optional matches no edge of the graph.
            PolicyError: no edge is quantized; or a rule assigns a scheme for the activations of
                products to a weight or to the input of another operation; or it assigns a scheme
                for values from zero up to a convolution.
        """
        # For each rule, the rules that decided the edges it matches.
        deciders: dict[int, set[int]] = {}
        chosen: dict[fx.Node, dict[Arg, TensorSpec]] = {}
        pinned: dict[fx.Node, frozenset[Arg]] = {}
        masked_nodes = masked(gm)
        notes = [
            Note(NoteKind.UNSUPPORTED, node.name, UNSUPPORTED[node.target])
            for node in gm.graph.nodes
            if node.target in UNSUPPORTED
        ]
        for edge in possible_edges(gm):
            hits = [i for i, rule in enumerate(self.rules) if rule.matches(edge)]
            if not hits and not edge.kind.is_product:
                continue  # float unless a rule names its operation
            for i in hits:
                deciders.setdefault(i, set()).add(hits[0])
            if not edge.kind.is_product and not masked_nodes.isdisjoint(edge.node.all_input_nodes):
                spec, reason = None, _MASKED_REASON
            else:
                spec, reason = self._decide(gm, edge, hits[0] if hits else None)
            if reason:
                kind = NoteKind.FLOAT if spec is None else NoteKind.ADJUSTED
                notes.append(Note(kind, edge.name, reason))
            if spec is not None:
                chosen.setdefault(edge.node, {})[edge.arg] = spec
                if self.rules[hits[0]].pinned:
                    pinned[edge.node] = pinned.get(edge.node, frozenset()) | {edge.arg}
        self._check_used(gm, set(deciders))
        if not chosen:
            raise PolicyError(
                f"the policy quantizes nothing of this model: {self._why_nothing(notes)}"
            )
        notes += [
            Note(
                NoteKind.RULE,
                f"rule {i + 1}",
                f"decides nothing: {_earlier(first)} before it matched all its edges",
            )
            for i, first in sorted(deciders.items())
            if i not in first
        ]
        for node, specs in chosen.items():
            QUANT_SPECS.set(node, specs)
            PINNED_ARGS.set(node, pinned.get(node, frozenset()))
        return PassResult(sum(map(len, chosen.values())), tuple(notes))

    def _decide(
        self, gm: fx.GraphModule, edge: Edge, hit: int | None
    ) -> tuple[TensorSpec | None, str]:
        """The spec of an edge and, where the spec differs from the rule's, the reason."""
        if reason := KEPT_FLOAT.get(edge.node):
            return None, reason
        if hit is None:
            return None, "left float: no rule matches it"
        spec = self.rules[hit].spec
        if spec is None:
            return None, f"left float: rule {hit + 1} keeps it float"
        value = edge.source.meta.get("val")
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            return None, "left float: the operand holds no floating-point numbers"
        if edge.arg is Arg.WEIGHT and constant(gm, edge.source) is None:
            return None, "left float: the weight is computed at run time"
        if edge.kind.is_product and rank(edge.source) < 2:
            return None, "left float: a vector operand has no integer kernel"
        _check_scheme(edge, spec.scheme, hit)
        if spec.observer is ObserverKind.SOFTMAX and not _is_last_axis_softmax(edge):
            spec = replace(spec, observer=ObserverKind.MINMAX)
            return spec, "observer minmax: its reader is not a softmax along the last axis"
        reason = _per_tensor_reason(edge, spec.granularity, value)
        return (replace(spec, granularity=Granularity.TENSOR) if reason else spec), reason

    @staticmethod
    def _why_nothing(notes: list[Note]) -> str:
        reasons = Counter(note.reason for note in notes)
        shown = (f"{count} x {reason!r}" for reason, count in reasons.most_common(3))
        return "; ".join(shown)

    def _check_used(self, gm: fx.GraphModule, matched: set[int]) -> None:
        for i, rule in enumerate(self.rules):
            if i not in matched and not rule.optional:
                paths = sorted({edge.path for edge in edges(gm)})
                feeds = sorted({fed_by(edge) for edge in edges(gm)})
                shown = ", ".join(paths[:8]) + (" …" if len(paths) > 8 else "")
                raise UnusedRuleError(
                    f"rule {i + 1} ({rule}) matches no edge. Mark it optional, remove it, or "
                    f"correct it: this model's module paths are {shown}; its edges are fed by "
                    f"{', '.join(feeds)}",
                    got=rule,
                )
