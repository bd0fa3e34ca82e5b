"""Passes that decide and place quantizers: AssignSpecs, InsertObservers, Freeze, QuantizeBias;
and the runner of passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant import passes, testing
from fxquant.calibrate import calibrate
from fxquant.capture import capture
from fxquant.compiler import CANONICAL
from fxquant.errors import CalibrationError, PassError, UnusedRuleError, VerifyError
from fxquant.graph import Edge, edges, get_parameter, op_kind, submodule
from fxquant.observers import Observer
from fxquant.passes import (
    AssignSpecs,
    Freeze,
    InsertObservers,
    Pass,
    PassResult,
    QuantizeBias,
    run_passes,
)
from fxquant.policy import Rule
from fxquant.quantizers import UniformQuantizer, accumulator_scale
from fxquant.spec import Arg, Granularity, ObserverKind, OpKind, Stage, TensorSpec
from fxquant.testing import DIM, assert_same_function, images, op_names, relative_error, seeded, tokens

EIGHT, FOUR = TensorSpec(bits=8), TensorSpec(bits=4)
WEIGHT = TensorSpec(symmetric=True, granularity=Granularity.CHANNEL)


def canonical(model: nn.Module, x: Tensor) -> fx.GraphModule:
    gm = capture(seeded(model), x)
    run_passes(gm, CANONICAL)
    return gm


def annotated(*rules: Rule, model: nn.Module | None = None) -> tuple[fx.GraphModule, PassResult]:
    gm = canonical(model or testing.Block(), tokens())
    return gm, run_passes(gm, [AssignSpecs(rules)])["AssignSpecs"]


def specs(gm: fx.GraphModule) -> dict[str, TensorSpec | None]:
    return {edge.name: edge.spec for edge in edges(gm)}


def reasons(result: PassResult) -> dict[str, str]:
    return {skip.site: skip.reason for skip in result.skips}


def observed(*rules: Rule, model: nn.Module | None = None) -> fx.GraphModule:
    gm, _ = annotated(*rules, model=model)
    run_passes(gm, [InsertObservers()])
    calibrate(gm, [tokens()])
    return gm


# AssignSpecs


def test_the_first_matching_rule_decides() -> None:
    gm, result = annotated(
        Rule(path="fc1", spec=FOUR), Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT)
    )
    found = specs(gm)
    assert found["fc1__weight"] == found["fc1__input"] == FOUR
    assert found["fc2__weight"] == WEIGHT and found["fc2__input"] == EIGHT
    assert result.changed == len(found) and result.skips == ()


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"fed_by": "softmax"}, {"attn_matmul_1__lhs"}),
        ({"fed_by": "gelu"}, {"fc2__input"}),
        (
            {"fed_by": "layer_norm"},
            {"attn_qkv__input", "attn_qkv_1__input", "attn_qkv_2__input", "fc1__input"},
        ),
        ({"fed_by": "matmul"}, {"attn_proj__input"}),
        ({"fed_by": "linear", "arg": Arg.LHS}, {"attn_matmul__lhs"}),
        ({"fed_by": "parameter", "path": r"fc\d"}, {"fc1__weight", "fc2__weight"}),
        ({"op": OpKind.MATMUL, "arg": Arg.RHS}, {"attn_matmul__rhs", "attn_matmul_1__rhs"}),
        ({"path": "fc", "optional": True}, set()),  # the whole path must match
    ],
    ids=str,
)
def test_rules_match_facts_of_the_graph(condition: dict[str, Any], expected: set[str]) -> None:
    gm, _ = annotated(Rule(spec=FOUR, **condition), Rule(spec=EIGHT))
    assert {name for name, spec in specs(gm).items() if spec == FOUR} == expected


def test_the_first_layer_is_fed_by_the_image() -> None:
    gm = canonical(testing.ConvNorm(), images())
    run_passes(gm, [AssignSpecs((Rule(fed_by="image", op=OpKind.CONV, spec=FOUR),))])
    assert specs(gm) == {"conv__input": FOUR, "conv__weight": None}


def test_an_unused_rule_is_an_error_that_shows_what_there_is() -> None:
    with pytest.raises(UnusedRuleError) as caught:
        annotated(Rule(spec=EIGHT), Rule(path="blocks.*", spec=FOUR))
    message = str(caught.value)
    assert message.startswith("rule 2 ") and "path='blocks.*'" in message
    assert "optional" in message and "attn.qkv" in message and "softmax" in message


def test_an_unused_optional_rule_is_none() -> None:
    gm, _ = annotated(Rule(fed_by="silu", spec=FOUR, optional=True), Rule(spec=EIGHT))
    assert set(specs(gm).values()) == {EIGHT}


def test_after_an_error_the_graph_is_not_annotated() -> None:
    gm = canonical(testing.Block(), tokens())
    with pytest.raises(UnusedRuleError):
        run_passes(gm, [AssignSpecs((Rule(spec=EIGHT), Rule(path="x", spec=FOUR)))])
    assert set(specs(gm).values()) == {None} and gm.meta["stage"] is Stage.FLOAT


def test_what_stays_float_says_why() -> None:
    _, result = annotated(Rule(path="fc1", spec=None), Rule(path="fc2", spec=EIGHT))
    why = reasons(result)
    assert why["fc1__input"] == "left float: rule 1 says so"
    assert why["attn_proj__weight"] == "left float: no rule matches it"
    assert "fc2__input" not in why


class Odd(nn.Module):
    """Products that have no integer kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, x[0])  # a weight made at run time
        return y @ x[0, 0, :5] + self.linear(x).sum(-1)


def test_run_time_weights_and_vectors_stay_float() -> None:
    _, result = annotated(Rule(spec=EIGHT), model=Odd())
    why = reasons(result)
    assert why["linear__weight"] == "left float: the weight is computed at run time"
    assert why["matmul__rhs"] == "left float: a vector operand has no integer kernel"


def test_a_product_of_whole_numbers_stays_float() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = (x > 0).long()
            return y @ y.transpose(1, 2) + (x @ x.transpose(1, 2))

    _, result = annotated(Rule(spec=EIGHT), model=Counts())
    assert "no floating-point numbers" in reasons(result)["matmul__lhs"]


def test_products_without_a_quantized_form_are_reported() -> None:
    class Upsample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.conv(x))

    gm = canonical(Upsample(), images())
    result = run_passes(gm, [AssignSpecs((Rule(spec=EIGHT),))])["AssignSpecs"]
    assert "transposed convolution has no quantized form yet" in reasons(result).values()


def test_an_einsum_is_reported() -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bnc,bnc->bn", x, x)[..., None] @ x[:, :1]

    _, result = annotated(Rule(spec=EIGHT), model=Scores())
    assert any("einsum" in reason for reason in reasons(result).values())


def test_a_scale_per_head_needs_a_matmul_with_heads() -> None:
    head = TensorSpec(granularity=Granularity.HEAD)
    gm, result = annotated(Rule(spec=head))
    found = specs(gm)
    assert found["attn_matmul__lhs"] == head
    assert found["fc1__input"] == found["fc1__weight"] == EIGHT
    assert "per tensor" in reasons(result)["fc1__input"]

    gm = canonical(testing.ConvNorm(), images())  # four axes, none of them heads
    result = run_passes(gm, [AssignSpecs((Rule(spec=head),))])["AssignSpecs"]
    assert specs(gm)["conv__input"] == EIGHT and "per tensor" in reasons(result)["conv__input"]


def test_a_scale_per_channel_of_an_image_runs_along_its_channels() -> None:
    gm = canonical(testing.ConvNorm(), images())
    run_passes(gm, [AssignSpecs((Rule(spec=TensorSpec(granularity=Granularity.CHANNEL)),))])
    run_passes(gm, [InsertObservers()])
    calibrate(gm, [images()])
    run_passes(gm, [Freeze()])
    quantizer = gm.get_submodule("quant.conv__input")
    assert isinstance(quantizer, UniformQuantizer) and len(quantizer.scale) == 3
    expected = images().amax((0, 2, 3)) - images().amin((0, 2, 3))
    torch.testing.assert_close(quantizer.scale * 255, expected)


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
    gm = observed(Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT))
    run_passes(gm, [Freeze()])
    assert not any(isinstance(module, Observer) for module in gm.modules())
    for edge in edges(gm):
        assert isinstance(submodule(gm, edge.source), UniformQuantizer)
    weight = gm.get_submodule("quant.fc1__weight")
    assert isinstance(weight, UniformQuantizer) and tuple(weight.scale.shape) == (2 * DIM,)
    assert weight.axis == 0 and weight.signed


def test_sixteen_bits_come_close_to_the_float_model() -> None:
    gm = observed(Rule(spec=TensorSpec(bits=16)))
    run_passes(gm, [Freeze(), QuantizeBias()])
    assert relative_error(gm(tokens()), seeded(testing.Block())(tokens())) < 1e-3


def test_tied_weights_share_a_quantizer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    gm = observed(Rule(spec=EIGHT), model=Twice())
    run_passes(gm, [Freeze()])
    sources = {edge.source for edge in edges(gm) if edge.arg is Arg.WEIGHT}
    assert len(sources) == 1


def test_freeze_without_data_raises_and_names_the_edge() -> None:
    gm, _ = annotated(Rule(spec=EIGHT))
    run_passes(gm, [InsertObservers()])
    with pytest.raises(CalibrationError, match="attn_qkv__input: no calibration data"):
        run_passes(gm, [Freeze()])


def test_calibrate_takes_an_observed_graph() -> None:
    gm, _ = annotated(Rule(spec=EIGHT))
    with pytest.raises(PassError, match="takes stage OBSERVED, got ANNOTATED"):
        calibrate(gm, [tokens()])


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
    gm = observed(Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT))
    run_passes(gm, [Freeze()])
    before = biases(gm)
    result = run_passes(gm, [QuantizeBias()])["QuantizeBias"]
    assert result.changed == len(before) == 6 and result.skips == ()
    for name, (bias, unit) in biases(gm).items():
        codes = bias / unit
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=1e-5)
        assert bool(((bias - before[name][0]).abs() <= unit * 0.5001).all())


def test_a_second_rounding_of_biases_changes_nothing() -> None:
    gm = observed(Rule(spec=EIGHT))
    run_passes(gm, [Freeze(), QuantizeBias()])
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
    gm = observed(*rules)
    run_passes(gm, [Freeze()])
    result = run_passes(gm, [QuantizeBias()])["QuantizeBias"]
    assert result.changed == 0 and len(result.skips) == 6
    assert {skip.reason for skip in result.skips} == {f"the bias stays float: {reason}"}


def test_a_bias_too_large_for_int32_widens_its_channels_scale() -> None:
    model = seeded(nn.Linear(DIM, DIM))
    model.bias.data[0] = 1e6
    gm = capture(model, tokens() * 1e-5)
    run_passes(gm, (*CANONICAL, AssignSpecs((Rule(spec=EIGHT),)), InsertObservers()))
    calibrate(gm, [tokens() * 1e-5])
    run_passes(gm, [Freeze()])
    assert run_passes(gm, [QuantizeBias()])["QuantizeBias"].skips == ()
    x, w = (gm.get_submodule(f"quant.linear__{arg}") for arg in ("input", "weight"))
    assert float((model.bias / accumulator_scale(x, w)).abs().max()) < 2**31
    assert_same_function(gm, model, tokens() * 1e-5, 1e-2)


# The runner


PASSES: list[Callable[[], Pass]] = [
    lambda name=name: AssignSpecs((Rule(spec=EIGHT),))
    if name == "AssignSpecs"
    else getattr(passes, name)()
    for name in passes.__all__
    if hasattr(getattr(passes, name), "requires") and name != "Pass"
]


def test_every_pass_is_covered_here() -> None:
    assert len(PASSES) == 12


@pytest.mark.parametrize("make", PASSES, ids=lambda make: type(make()).__name__)
def test_the_wrong_stage_raises(make: Callable[[], Pass]) -> None:
    item = make()
    gm = capture(seeded(nn.Linear(DIM, DIM)), tokens())
    gm.meta["stage"] = next(s for s in Stage if s is not item.requires)
    with pytest.raises(PassError, match=f"{type(item).__name__} takes .*{item.requires.name}, got"):
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
    with pytest.raises(PassError, match=r"Broken failed \(LookupError: lost\).*before it: DropNoOps"):
        run_passes(gm, [passes.DropNoOps(), Broken(fails)])


def test_a_graph_that_breaks_a_rule_of_its_stage_is_caught() -> None:
    gm = capture(seeded(nn.Linear(DIM, DIM)), tokens())
    with pytest.raises(VerifyError, match="stage FLOAT: .* is annotated"):
        run_passes(gm, [Broken(annotates)])


def test_observer_kinds_reach_the_edges() -> None:
    rules = [
        Rule(fed_by="softmax", spec=TensorSpec(observer=ObserverKind.PERCENTILE)),
        Rule(spec=TensorSpec(observer=ObserverKind.MSE)),
    ]
    gm, _ = annotated(*rules)
    run_passes(gm, [InsertObservers()])
    observer = gm.get_submodule("quant.attn_matmul_1__lhs")
    assert isinstance(observer, Observer) and observer.spec == rules[0].spec
