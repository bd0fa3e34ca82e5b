"""The rules that a graph must keep in each stage, and their check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import fx

from fxquant.config.vocabulary import Arg, Stage
from fxquant.errors import VerifyError
from fxquant.graph.dialect import elementwise_kind, op_kind
from fxquant.graph.edges import possible_edges, quantized_edges
from fxquant.graph.meta import QUANT_SPECS
from fxquant.graph.nodes import stage, submodule
from fxquant.observers.observer import Observer
from fxquant.quantizers import Quantizer


def _one_input(gm: fx.GraphModule) -> str | None:
    count = sum(node.op == "placeholder" for node in gm.graph.nodes)
    return None if count == 1 else f"{count} placeholders, one image tensor is expected"


def _no_annotation(gm: fx.GraphModule) -> str | None:
    for node in gm.graph.nodes:
        if QUANT_SPECS.get(node) is not None:
            return f"{node.name} is annotated"
    return None


def _annotations_fit(gm: fx.GraphModule) -> str | None:
    valid = {(edge.node, edge.arg) for edge in possible_edges(gm)}
    for node in gm.graph.nodes:
        for arg in QUANT_SPECS.get(node) or ():
            if (node, arg) not in valid:
                return f"{node.name} has no quantizable argument {arg}"
    return None


def _unique_names(gm: fx.GraphModule) -> str | None:
    counts = Counter(edge.name for edge in possible_edges(gm))
    twice = sorted(name for name, count in counts.items() if count > 1)
    return f"edge names occur twice: {twice}" if twice else None


def _observed(gm: fx.GraphModule) -> str | None:
    for edge in quantized_edges(gm):
        if edge.arg is not Arg.WEIGHT and not isinstance(submodule(gm, edge.source), Observer):
            return f"{edge.name} has no observer"
    return None


def _frozen(gm: fx.GraphModule) -> str | None:
    for edge in quantized_edges(gm):
        quantizer = submodule(gm, edge.source)
        if not isinstance(quantizer, Quantizer):
            return f"{edge.name} has no quantizer"
        if not all(bool(torch.isfinite(buffer).all()) for buffer in quantizer.buffers()):
            return f"{edge.name}: a parameter of its quantizer is not finite"
    return None


def _no_module_of(kind: type) -> Callable[[fx.GraphModule], str | None]:
    def rule(gm: fx.GraphModule) -> str | None:
        for node in gm.graph.nodes:
            if isinstance(submodule(gm, node), kind):
                return f"{node.name} calls a {kind.__name__}"
        return None

    return rule


def _quantizers_feed_products(gm: fx.GraphModule) -> str | None:
    for node in gm.graph.nodes:
        if isinstance(submodule(gm, node), Quantizer | Observer):
            users = (u for u in node.users if op_kind(u) is None and elementwise_kind(u) is None)
            names = [user.name for user in users]
            if names:
                return f"{node.name} feeds {names[0]}, which is not a quantizable operation"
    return None


# Stage -> rules; a rule returns how the graph breaks it, or None.
RULES: dict[Stage, tuple[Callable[[fx.GraphModule], str | None], ...]] = {
    Stage.FLOAT: (_one_input, _no_annotation, _no_module_of(Observer), _no_module_of(Quantizer)),
    Stage.ANNOTATED: (
        _one_input,
        _annotations_fit,
        _unique_names,
        _no_module_of(Observer),
        _no_module_of(Quantizer),
    ),
    Stage.OBSERVED: (
        _one_input,
        _annotations_fit,
        _observed,
        _quantizers_feed_products,
        _no_module_of(Quantizer),
    ),
    Stage.FROZEN: (
        _one_input,
        _annotations_fit,
        _frozen,
        _quantizers_feed_products,
        _no_module_of(Observer),
    ),
}


def verify(gm: fx.GraphModule) -> None:
    """Checks the rules of the graph's stage.

    Raises:
        VerifyError: the graph breaks a rule, because of a bug in the last pass.
    """
    for rule in RULES[stage(gm)]:
        violation = rule(gm)
        if violation:
            raise VerifyError(
                f"stage {stage(gm).name}: {violation}. This is a bug in the pass that ran last"
            )
