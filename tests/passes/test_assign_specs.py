"""AssignSpecs: which rule decides, and what stays float and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant import testing
from fxquant.config.spec import Granularity, ObserverKind, TensorSpec
from fxquant.config.vocabulary import Arg, OpKind, Stage
from fxquant.errors import UnusedRuleError
from fxquant.passes import AssignSpecs, run_passes
from fxquant.policies import PRESETS
from fxquant.policies.policy import Rule
from fxquant.quantizers import UniformQuantizer
from fxquant.testing import DIM, images, tokens
from tests.helpers.refusals import refused
from tests.helpers.stages import EIGHT, FOUR, WEIGHT, annotated, canonical, frozen, reasons, specs


def test_the_first_matching_rule_decides() -> None:
    gm, result = annotated(
        Rule(path="fc1", spec=FOUR), Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT)
    )
    found = specs(gm)
    assert found["fc1__weight"] == found["fc1__input"] == FOUR
    assert found["fc2__weight"] == WEIGHT and found["fc2__input"] == EIGHT
    assert result.changed == len(found) and result.notes == ()


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
        (
            {"end": "first"},
            {f"attn_qkv{copy}__{arg}" for copy in ("", "_1", "_2") for arg in ("input", "weight")},
        ),
        ({"end": "last", "arg": Arg.WEIGHT}, {"fc2__weight"}),
        ({"path": "fc", "optional": True}, set()),  # the whole path must match
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_rules_match_facts_of_the_graph(condition: dict[str, Any], expected: set[str]) -> None:
    gm, _ = annotated(Rule(spec=FOUR, **condition), Rule(spec=EIGHT))
    assert {name for name, spec in specs(gm).items() if spec == FOUR} == expected


def test_the_first_layer_is_fed_by_the_image() -> None:
    gm = canonical(testing.ConvNorm(), images())
    run_passes(gm, [AssignSpecs((Rule(fed_by="image", op=OpKind.CONV, spec=FOUR),))])
    assert specs(gm) == {"conv__input": FOUR, "conv__weight": None}


class Heads(nn.Module):
    """Images are normalised inside; two heads are averaged, as in distilled models."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.table = nn.Parameter(torch.eye(DIM))
        self.probe = nn.Linear(DIM, DIM)
        self.heads = nn.ModuleList(nn.Linear(DIM, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(nn.functional.gelu(self.stem((x - 0.5) / 0.25)))
        x = x + nn.functional.linear(self.table, self.middle.weight).mean(0)
        probe = self.probe(self.table[0].expand(x.shape[0], 1, -1))
        x = self.middle(x + probe)
        first, second = (head(x) for head in self.heads)
        return ((first + second) / 2).softmax(-1)


def test_the_ends_are_products_with_none_before_or_after() -> None:
    gm = canonical(Heads(), tokens())
    run_passes(gm, [AssignSpecs((Rule(end="first", spec=EIGHT), Rule(end="last", spec=FOUR)))])  # type: ignore[arg-type]
    found = {name: spec for name, spec in specs(gm).items() if spec is not None}
    assert found == {
        "stem__input": EIGHT,
        "stem__weight": EIGHT,
        **{f"heads_{i}__{arg}": FOUR for i in range(2) for arg in ("input", "weight")},
    }


def test_an_unused_rule_is_an_error_that_shows_what_there_is() -> None:
    rule = Rule(path="blocks.*", spec=FOUR)
    with refused(UnusedRuleError, got=rule) as caught:
        annotated(Rule(spec=EIGHT), rule)
    message = str(caught.value)
    assert message.startswith("rule 2 ") and "(path: blocks.*)" in message
    assert "optional" in message and "attn.qkv" in message and "softmax" in message


def test_an_unused_optional_rule_is_none() -> None:
    gm, _ = annotated(Rule(fed_by="silu", spec=FOUR, optional=True), Rule(spec=EIGHT))
    assert set(specs(gm).values()) == {EIGHT}


def test_a_rule_that_never_comes_first_is_reported() -> None:
    _, result = annotated(
        Rule(path="fc1", spec=FOUR), Rule(spec=EIGHT), Rule(path="fc.*", spec=FOUR)
    )
    assert reasons(result) == {
        "rule 3": "decides nothing: rules 1, 2 before it matched all its edges"
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_a_model_of_products_only(name: str) -> None:
    gm, _ = annotated(*PRESETS[name]().rules, model=OverImages())
    assert None not in specs(gm).values()


class OverImages(nn.Module):
    """Products whose channels, or whose heads, are the images of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(1, 2, 0) @ x.transpose(0, 1)  # (N, C, B) @ (N, B, C)
        z = x[None]  # (1, B, N, C)
        return (z @ z.transpose(-1, -2)).sum() + y


@pytest.mark.parametrize(
    ("granularity", "changed", "kept"),
    [("channel", "matmul__lhs", "matmul__rhs"), ("head", "matmul_1__lhs", None)],
)
def test_an_axis_of_the_batch_gets_one_scale(
    granularity: str, changed: str, kept: str | None
) -> None:
    wanted = TensorSpec(granularity=Granularity(granularity))
    gm, result = annotated(Rule(spec=wanted), model=OverImages())
    assert specs(gm)[changed] == EIGHT
    assert reasons(result)[changed] == (
        f"per tensor: the size of its {granularity} axis changes with the batch"
    )
    assert kept is None or specs(gm)[kept] == wanted


def test_after_an_error_the_graph_is_not_annotated() -> None:
    gm = canonical(testing.Block(), tokens())
    rule = Rule(path="x", spec=FOUR)
    with refused(UnusedRuleError, got=rule):
        run_passes(gm, [AssignSpecs((Rule(spec=EIGHT), rule))])
    assert set(specs(gm).values()) == {None} and gm.meta["stage"] is Stage.FLOAT


def test_what_stays_float_says_why() -> None:
    _, result = annotated(Rule(path="fc1", spec=None), Rule(path="fc2", spec=EIGHT))
    why = reasons(result)
    assert why["fc1__input"] == "left float: rule 1 keeps it float"
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
    assert "left float: conv_transpose2d has no quantized form yet" in reasons(result).values()


def test_an_einsum_is_reported() -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bnc,bnc->bnc", x, x) @ x.transpose(1, 2)

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
    rule = Rule(spec=TensorSpec(granularity=Granularity.CHANNEL))
    gm = frozen(rule, model=testing.ConvNorm(), data=[images()])
    quantizer = gm.get_submodule("quant.conv__input")
    assert isinstance(quantizer, UniformQuantizer) and len(quantizer.scale) == 3
    expected = images().amax((0, 2, 3)) - images().amin((0, 2, 3))
    torch.testing.assert_close(quantizer.scale * 255, expected)


def test_the_observer_of_a_softmax_is_for_a_softmax_along_the_last_axis() -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).softmax(1)).softmax(-1)

    spec = TensorSpec(observer=ObserverKind.SOFTMAX)
    gm, result = annotated(Rule(op=OpKind.SOFTMAX, spec=spec), Rule(spec=EIGHT), model=Across())
    found = specs(gm)
    assert found["softmax__input"] == TensorSpec() and found["softmax_1__input"] == spec
    why = "observer minmax: its reader is not a softmax along the last axis"
    assert reasons(result)["softmax__input"] == why
