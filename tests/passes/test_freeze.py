"""Passes that place and fit quantizers: InsertObservers, Freeze, QuantizeBias; and the runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant import passes, testing
from fxquant.calibration.observe import observe
from fxquant.config.low_rank import LowRank
from fxquant.config.recovery import Compensation, Reconstruction
from fxquant.config.scale_search import ScaleSearch
from fxquant.config.spec import Granularity, ObserverKind, TensorSpec
from fxquant.config.vocabulary import Arg, OpKind, Stage
from fxquant.errors import CalibrationError, PassError, VerifyError
from fxquant.graph.capture import capture
from fxquant.graph.dialect import op_kind
from fxquant.graph.edges import Edge, edges
from fxquant.graph.nodes import get_parameter, submodule
from fxquant.graph.rewrite import set_bias
from fxquant.observers.observer import Observer
from fxquant.passes import (
    Freeze,
    InsertObservers,
    Pass,
    PassResult,
    QuantizeBias,
    run_passes,
)
from fxquant.policies.policy import Rule
from fxquant.quantizers import UniformQuantizer, accumulator_scale
from fxquant.reconstruction.image_split import split_images
from fxquant.smoothing.choose import FoldDecisions
from fxquant.testing import (
    DIM,
    assert_same_function,
    op_names,
    relative_error,
    seeded,
    tokens,
)
from tests.helpers.refusals import refused
from tests.helpers.stages import EIGHT, FOUR, WEIGHT, annotated, canonical, frozen, with_observers

# InsertObservers, calibrate, Freeze


def test_observers_sit_on_activations_and_are_shared_by_equal_edges() -> None:
    gm, _ = annotated(Rule(spec=EIGHT))
    before = op_names(gm)
    result = run_passes(gm, [InsertObservers()])["InsertObservers"]
    found = {n for n, m in gm.named_modules() if isinstance(m, Observer)}
    assert "quant.attn_qkv__input" in found and "quant.attn_qkv_1__input" not in found
    assert not any(name.endswith("weight") for name in found)
    assert result.changed == len(found) == 8
    assert [name for name in op_names(gm) if "Observer" not in name] == before
    assert_same_function(gm, seeded(testing.Block()), tokens())


def test_edges_with_other_specs_do_not_share() -> None:
    gm, _ = annotated(Rule(path="attn.qkv", arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT))
    query, *_ = [edge for edge in edges(gm) if edge.name == "attn_qkv__input"]
    query.node.meta["quant"] = {**query.node.meta["quant"], Arg.INPUT: FOUR}
    run_passes(gm, [InsertObservers()])
    found = {n for n, m in gm.named_modules() if isinstance(m, Observer)}
    assert {"quant.attn_qkv__input", "quant.attn_qkv_1__input"} <= found


def test_freeze_puts_a_quantizer_on_every_annotated_edge() -> None:
    gm = frozen(Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT))
    assert not any(isinstance(module, Observer) for module in gm.modules())
    for edge in edges(gm):
        assert isinstance(submodule(gm, edge.source), UniformQuantizer)
    weight = gm.get_submodule("quant.fc1__weight")
    assert isinstance(weight, UniformQuantizer) and tuple(weight.scale.shape) == (2 * DIM,)
    assert weight.axis == 0 and weight.signed


def test_sixteen_bits_come_close_to_the_float_model() -> None:
    gm = frozen(Rule(spec=TensorSpec(bits=16)))
    run_passes(gm, [QuantizeBias()])
    assert relative_error(gm(tokens()), seeded(testing.Block())(tokens())) < 1e-3


def test_tied_weights_share_a_quantizer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    gm = frozen(Rule(spec=EIGHT), model=Twice())
    sources = {edge.source for edge in edges(gm) if edge.arg is Arg.WEIGHT}
    assert len(sources) == 1


def test_freeze_without_data_raises_and_names_the_edge() -> None:
    gm = with_observers(Rule(spec=EIGHT))
    with refused(CalibrationError, edge="attn_qkv__input"):
        run_passes(gm, [Freeze()])


def test_calibrate_takes_an_observed_graph() -> None:
    gm, _ = annotated(Rule(spec=EIGHT))
    text = "^observe requires stage OBSERVED, got ANNOTATED"
    with refused(PassError, text, got=Stage.ANNOTATED, expected=Stage.OBSERVED):
        observe(gm, [(tokens(), None)])


# QuantizeBias


def biases(gm: fx.GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Node name -> (bias, unit of its accumulator)."""
    found = {}
    for node in gm.graph.nodes:
        if op_kind(node) is OpKind.LINEAR:
            pair = [submodule(gm, Edge(node, arg).source) for arg in (Arg.INPUT, Arg.WEIGHT)]
            found[node.name] = get_parameter(gm, node.args[2]), pair[0].scale * pair[1].scale
    return found


def test_biases_move_to_the_grid_of_the_accumulator() -> None:
    gm = frozen(Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT))
    before = biases(gm)
    result = run_passes(gm, [QuantizeBias()])["QuantizeBias"]
    assert result.changed == len(before) == 6 and result.notes == ()
    for name, (bias, unit) in biases(gm).items():
        codes = bias / unit
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=1e-5)
        assert bool(((bias - before[name][0]).abs() <= unit * 0.5001).all())


def test_a_second_rounding_of_biases_changes_nothing() -> None:
    gm = frozen(Rule(spec=EIGHT))
    run_passes(gm, [QuantizeBias()])
    before, names = biases(gm), op_names(gm)
    assert run_passes(gm, [QuantizeBias()])["QuantizeBias"].changed == 0
    assert op_names(gm) == names
    assert all(torch.equal(bias, before[name][0]) for name, (bias, _) in biases(gm).items())


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ([Rule(arg=Arg.WEIGHT, spec=WEIGHT)], "input or weight is not quantized uniformly"),
        (
            [
                Rule(arg=Arg.INPUT, spec=TensorSpec(granularity=Granularity.CHANNEL)),
                Rule(spec=EIGHT),
            ],
            "the input has a scale per channel",
        ),
    ],
)
def test_a_bias_stays_float_and_says_why(rules: list[Rule], reason: str) -> None:
    gm = frozen(*rules)
    result = run_passes(gm, [QuantizeBias()])["QuantizeBias"]
    assert result.changed == 0 and len(result.notes) == 6
    assert {skip.reason for skip in result.notes} == {f"the bias stays float: {reason}"}


def test_a_bias_too_large_for_int32_widens_its_channels_scale() -> None:
    model = seeded(nn.Linear(DIM, DIM))
    model.bias.data[0] = 1e6
    gm = frozen(Rule(spec=EIGHT), model=model, data=[tokens() * 1e-5], seed=False)
    assert run_passes(gm, [QuantizeBias()])["QuantizeBias"].notes == ()
    x, w = (gm.get_submodule(f"quant.linear__{arg}") for arg in ("input", "weight"))
    assert float((model.bias.data / accumulator_scale(x, w)).abs().max()) < 2**31
    assert_same_function(gm, model, tokens() * 1e-5, 1e-2)


class OneBiasOfTwo(nn.Module):
    """Two linears that read one bias, and one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.none = nn.Linear(DIM, DIM, bias=False)
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.none(self.two(self.one(x)))


def test_a_bias_is_set_for_one_product_alone() -> None:
    gm = canonical(OneBiasOfTwo(), tokens())
    one, two, none = (node for node in gm.graph.nodes if op_kind(node) is OpKind.LINEAR)
    old = one.args[2]
    set_bias(gm, one, torch.zeros(DIM))
    assert two.args[2] is old
    set_bias(gm, none, torch.ones(DIM))
    set_bias(gm, two, torch.full((DIM,), 2.0))
    assert old not in gm.graph.nodes
    assert [get_parameter(gm, n.args[2])[0] for n in (one, none, two)] == [0, 1, 2]


def test_a_row_of_zeros_keeps_its_bias() -> None:
    model = seeded(nn.Linear(DIM, DIM))
    model.weight.data[0] = 0
    model.weight.data[1] = 1e-34
    model.bias.data[:2] = 0.37
    rules = Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT)
    gm = frozen(*rules, model=model, data=[tokens() * 10], seed=False)
    run_passes(gm, [QuantizeBias()])
    torch.testing.assert_close(gm(tokens())[..., :2], torch.full_like(tokens()[..., :2], 0.37))


# The runner


OPTIONS = {
    "AllocateBits": [{}],
    "AssignSpecs": [(Rule(spec=EIGHT),)],
    "CentreHeads": [{}],
    "Reparameterize": [{}],
    "SmoothWithBias": [FoldDecisions({}, {}, {})],
    "SearchScales": ({}, ScaleSearch()),
    "CorrectBias": ({},),
    "Compensate": (None, Compensation()),
    "Reconstruct": (None, Reconstruction(), split_images(4, None)),
    "AttachLowRank": ({}, LowRank(rank=1)),
}
PASSES: list[Callable[[], Pass]] = [
    lambda name=name: getattr(passes, name)(*OPTIONS.get(name, ()))
    for name in passes.__all__
    if hasattr(getattr(passes, name), "requires") and name != "Pass"
]


def test_every_pass_is_covered_here() -> None:
    assert len(PASSES) == 28


@pytest.mark.parametrize("make", PASSES, ids=lambda make: type(make()).__name__)
def test_the_wrong_stage_raises(make: Callable[[], Pass]) -> None:
    item = make()
    gm = capture(seeded(nn.Linear(DIM, DIM)), tokens())
    stage = next(s for s in Stage if s is not item.requires)
    gm.meta["stage"] = stage
    text = f"^{type(item).__name__} requires a graph in stage"
    with refused(PassError, text, got=stage, expected=item.requires):
        run_passes(gm, [item])
    assert op_names(gm) == ["linear"]


@dataclass(frozen=True)
class Broken:
    """A pass with a bug."""

    bug: Callable[[fx.GraphModule], None]
    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        self.bug(gm)
        return PassResult(1)


def fails(gm: fx.GraphModule) -> None:
    raise LookupError("lost")


def annotates(gm: fx.GraphModule) -> None:
    next(iter(gm.graph.nodes)).meta["quant"] = {}


def test_a_failing_pass_is_named_with_those_before_it() -> None:
    gm = capture(seeded(nn.Linear(DIM, DIM)), tokens())
    with pytest.raises(
        PassError, match=r"Broken failed \(LookupError: lost\).*before it: DropNoOps"
    ):
        run_passes(gm, [passes.DropNoOps(), Broken(fails)])


def test_a_graph_that_breaks_a_rule_of_its_stage_is_caught() -> None:
    gm = capture(seeded(nn.Linear(DIM, DIM)), tokens())
    with pytest.raises(VerifyError, match=r"stage FLOAT: .* is annotated"):
        run_passes(gm, [Broken(annotates)])


def test_observer_kinds_reach_the_edges() -> None:
    rules = [
        Rule(fed_by="softmax", spec=TensorSpec(observer=ObserverKind.PERCENTILE)),
        Rule(spec=TensorSpec(observer=ObserverKind.MSE)),
    ]
    gm = with_observers(*rules)
    observer = gm.get_submodule("quant.attn_matmul_1__lhs")
    assert isinstance(observer, Observer) and observer.spec == rules[0].spec
