"""AllocateBits, and the marks that it and the groups go by."""

from __future__ import annotations

import copy

import pytest
import torch

from fxquant import testing
from fxquant.config.spec import Scheme, TensorSpec
from fxquant.config.vocabulary import Arg, Stage
from fxquant.errors import BitWidthError, PassError
from fxquant.graph.edges import edges
from fxquant.graph.nodes import stage
from fxquant.mixed_precision.sensitivity.groups import WidthGroups
from fxquant.passes import AllocateBits, Freeze, run_passes
from fxquant.policies.policy import Rule
from fxquant.quantizers import Quantizer
from fxquant.testing import assert_same_function, op_names, seeded, tokens
from tests.helpers.refusals import refused
from tests.helpers.stages import EIGHT, FOUR, WEIGHT, observed, specs

WIDTHS = {
    "fc1__input": 3,
    "fc1__weight": 5,
    "attn_qkv__input": 4,
    "attn_qkv_1__input": 4,
    "attn_qkv_2__input": 4,
}


def test_edges_get_their_widths_and_quantizers_are_fitted_at_them() -> None:
    gm = observed(Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT))
    before, names = specs(gm), op_names(gm)
    result = run_passes(gm, [AllocateBits(WIDTHS)])["AllocateBits"]
    assert result.changed == 5 and result.notes == ()
    assert op_names(gm) == names and stage(gm) is Stage.OBSERVED
    for name, spec in specs(gm).items():
        old = before[name]
        assert spec is not None and old is not None
        assert spec.bits == WIDTHS.get(name, 8)
        assert (spec.symmetric, spec.granularity) == (old.symmetric, old.granularity)
    assert_same_function(gm, seeded(testing.Block()), tokens())
    run_passes(gm, [Freeze()])
    for edge in edges(gm):
        quantizer = gm.get_submodule(str(edge.source.target))
        assert isinstance(quantizer, Quantizer) and quantizer.bits == WIDTHS.get(edge.name, 8)


def test_the_result_is_that_of_rules_with_these_widths() -> None:
    one = observed(Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT))
    activations = {e.name: 4 for e in edges(one) if e.arg is not Arg.WEIGHT}
    run_passes(one, [AllocateBits(activations), Freeze()])
    two = observed(Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=FOUR))
    run_passes(two, [Freeze()])
    assert torch.equal(one(tokens()), two(tokens()))


def test_a_second_run_changes_nothing() -> None:
    gm = observed(Rule(spec=EIGHT))
    run_passes(gm, [AllocateBits(WIDTHS)])
    before = specs(gm)
    assert run_passes(gm, [AllocateBits(WIDTHS)])["AllocateBits"].changed == 0
    assert specs(gm) == before


def test_a_float_edge_stays_float_and_says_so() -> None:
    gm = observed(Rule(arg=Arg.WEIGHT, spec=None), Rule(spec=EIGHT))
    result = run_passes(gm, [AllocateBits({"fc1__weight": 4})])["AllocateBits"]
    assert result.changed == 0 and specs(gm)["fc1__weight"] is None
    assert [(skip.site, skip.reason) for skip in result.notes] == [
        ("fc1__weight", "gets no width: the edge is float")
    ]


@pytest.mark.parametrize(
    ("widths", "fields", "text"),
    [
        ({"nowhere__input": 4}, {"edge": "nowhere__input"}, "no edges nowhere__input"),
        (
            {"attn_qkv__input": 4},
            {"edge": "attn_qkv_1__input", "got": 8, "expected": 4},
            "attn_qkv_1__input shares its observer with an edge of 4 bits",
        ),
    ],
)
def test_widths_that_do_not_fit_the_graph_raise(
    widths: dict[str, int], fields: dict[str, object], text: str
) -> None:
    gm = observed(Rule(spec=EIGHT))
    before = copy.deepcopy(specs(gm))
    with refused(PassError, text, **fields):
        run_passes(gm, [AllocateBits(widths)])
    assert specs(gm) == before


def test_a_width_that_a_scheme_does_not_take_raises() -> None:
    twin = TensorSpec(bits=4, scheme=Scheme.TWIN_UNIFORM)
    gm = observed(Rule(fed_by="gelu", spec=twin), Rule(spec=EIGHT))
    with refused(BitWidthError, got=9, expected="2..8"):
        run_passes(gm, [AllocateBits({"fc2__input": 9})])


# What shares a width


def grouped(layout: WidthGroups) -> dict[str, set[str]]:
    return {group.name: {edge.name for edge in group.edges} for group in layout.groups}


def test_packed_projections_and_shared_quantizers_are_groups() -> None:
    layout = WidthGroups(observed(Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT)))
    found = grouped(layout)
    assert found["attn_qkv__weight"] == {
        "attn_qkv__weight",
        "attn_qkv_1__weight",
        "attn_qkv_2__weight",
    }
    assert found["attn_qkv__input"] == {"attn_qkv__input", "attn_qkv_1__input", "attn_qkv_2__input"}
    assert all(len(names) == 1 for name, names in found.items() if "qkv" not in name)
    assert {"attn_matmul__lhs", "attn_matmul__rhs", "fc1__weight"} <= set(found)
    assert layout.fixed == ()


def test_pinned_edges_are_constants() -> None:
    gm = observed(
        Rule(path="fc1", arg=Arg.INPUT, spec=TensorSpec(bits=10), pinned=True),
        Rule(path="attn.qkv", arg=Arg.INPUT, spec=EIGHT, pinned=True),
        Rule(arg=Arg.WEIGHT, spec=None),
        Rule(spec=EIGHT),
    )
    layout = WidthGroups(gm)
    assert {(f.name, f.bits, f.is_weight) for f in layout.fixed} == {
        ("fc1__input", 10, False),
        ("attn_qkv__input", 8, False),
    }
    assert not {"fc1__input", "attn_qkv__input"} & set(grouped(layout))
    assert not any(group.is_weight for group in layout.groups)
    assert len(layout.products) == 2  # those of attention; the others have a float weight


def test_values_and_multiplications_are_those_of_one_image() -> None:
    layout = WidthGroups(observed(Rule(spec=EIGHT)))
    values = {group.name: layout.values(group) for group in layout.groups}
    n, c, heads = testing.TOKENS, testing.DIM, testing.HEADS
    assert values["attn_qkv__weight"] == 3 * c * c and values["fc1__weight"] == 2 * c * c
    assert values["attn_qkv__input"] == n * c and values["fc2__input"] == 2 * n * c
    assert values["attn_matmul__lhs"] == n * c and values["attn_matmul_1__lhs"] == heads * n * n
    macs = {(p.left, p.right): p.macs for p in layout.products}
    assert macs["fc1__input", "fc1__weight"] == n * c * 2 * c
    assert macs["attn_matmul__lhs", "attn_matmul__rhs"] == n * n * c
    assert sum(p.macs for p in layout.products) == n * c * c * (3 + 1 + 4) + 2 * n * n * c
