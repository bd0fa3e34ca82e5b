"""Quantizers on norms, softmax, activation functions and additions: rules, plan, backends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fxquant import Policy, Rule, TensorSpec, policies, testing
from fxquant.config.spec import Scheme
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.errors import PolicyError, UnusedRuleError
from fxquant.graph.edges import edges, possible_edges
from fxquant.graph.nodes import submodule
from fxquant.passes import AssignSpecs, InsertObservers, run_passes
from fxquant.quantizers import Quantizer
from tests.helpers.agreement import assert_same_codes
from tests.helpers.integer_only import Windows, compiled, full, images
from tests.helpers.refusals import refused
from tests.helpers.stages import EIGHT, FOUR, annotated, canonical, frozen, reasons, specs

ELEMENTWISE = [kind for kind in OpKind if not kind.is_product]
BLOCK = {
    "norm1__input",
    "attn_softmax__input",
    "add__lhs",
    "add__rhs",
    "norm2__input",
    "gelu__input",
    "add_1__lhs",
    "add_1__rhs",
}


def test_rules_that_name_no_operation_match_products_alone() -> None:
    gm, result = annotated(Rule(spec=EIGHT))
    assert all(edge.kind.is_product for edge in edges(gm))
    assert {edge.name for edge in possible_edges(gm) if not edge.kind.is_product} == BLOCK
    assert not BLOCK & set(reasons(result))


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_a_rule_that_names_an_operation_matches_it(kind: OpKind) -> None:
    gm = canonical(Windows(), images())
    run_passes(gm, [AssignSpecs((Rule(op=kind, spec=FOUR), Rule(spec=EIGHT)))])
    found = {edge.name for edge in edges(gm) if edge.spec == FOUR}
    wanted = {edge.name for edge in possible_edges(gm) if edge.kind is kind}
    assert found == wanted != set()
    assert {edge.spec for edge in edges(gm) if edge.kind is not kind} == {EIGHT}


def test_what_a_rule_keeps_float_is_no_part_of_the_plan() -> None:
    gm, result = annotated(Rule(op=OpKind.ADD, spec=None), Rule(spec=EIGHT))
    assert set(specs(gm)).isdisjoint(BLOCK)
    assert reasons(result)["add__lhs"] == "left float: rule 1 keeps it float"


def test_operations_are_named_after_their_modules() -> None:
    names = {entry.edge for entry in full().plan if OpKind(entry.op) in ELEMENTWISE}
    assert {"norm__input", "softmax__input", "gelu__input", "norm2__input", "add__rhs"} <= names


def test_additions_of_numbers_and_of_integers_have_no_such_edges() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(testing.DIM, testing.DIM)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            index = torch.arange(3) + torch.ones(3, dtype=torch.int64)
            return self.layer(x + 1.5)[:, index + (x[0, 0, 0] > 0)]

    gm = canonical(Net(), testing.tokens())
    assert [e.name for e in possible_edges(gm) if e.kind is OpKind.ADD] == ["add_1__lhs"]


def test_a_full_policy_quantizes_everything_between_products() -> None:
    plan = full().plan
    assert all(entry.spec is not None and entry.quantizer for entry in plan)
    assert {OpKind(entry.op) for entry in plan} == set(OpKind)
    constants = [e for e in plan if e.op == OpKind.ADD and e.fed_by == "parameter"]
    assert len(constants) == 3  # bias, mask and position embedding
    assert {e.spec.bits for e in constants if e.spec} == {16}
    assert {e.spec.bits for e in plan if e not in constants if e.spec} == {8}


def test_a_value_read_by_a_norm_and_a_sum_is_quantized_once() -> None:
    gm = frozen(*policies.elementwise_rules(), Rule(spec=EIGHT))
    sources = {edge.name: edge.source for edge in edges(gm)}
    assert sources["norm2__input"] is sources["add_1__lhs"]
    assert all(isinstance(submodule(gm, node), Quantizer) for node in sources.values())


def test_twin_codes_are_for_products() -> None:
    twin = TensorSpec(scheme=Scheme.TWIN_UNIFORM)
    text = r"gelu__input: rule 1 .* is for inputs of products"
    with refused(PolicyError, text, edge="gelu__input", got=Scheme.TWIN_UNIFORM):
        annotated(Rule(op=OpKind.ACTIVATION, spec=twin), Rule(spec=EIGHT))


def test_a_rule_for_an_operation_that_is_not_there_is_an_error() -> None:
    rule = Rule(op=OpKind.RMS_NORM, spec=EIGHT)
    with refused(UnusedRuleError, got=rule):
        annotated(rule, Rule(spec=EIGHT))


def test_a_rule_for_a_side_of_an_addition() -> None:
    gm, _ = annotated(Rule(op=OpKind.ADD, arg=Arg.RHS, spec=FOUR), Rule(spec=EIGHT))
    found = specs(gm)
    assert found["add__rhs"] == found["add_1__rhs"] == FOUR and "add__lhs" not in found


def searched() -> Policy:
    policy = policies.ptq4vit(8, 6)
    assert policy.search is not None
    search = replace(policy.search, rounds=1, candidates=10, rows=64)
    return replace(policy, search=search, rules=(*policies.elementwise_rules(8), *policy.rules))


def test_a_search_leaves_quantizers_of_no_product_as_they_were_fitted() -> None:
    qm = compiled(searched())
    plain = compiled(replace(searched(), search=None))
    moved = set()
    for entry in qm.plan:
        assert entry.quantizer is not None
        one, two = (m.graph_module.get_submodule(entry.quantizer) for m in (qm, plain))
        if any(not torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True)):
            moved.add(OpKind(entry.op))
    assert moved == {OpKind.CONV, OpKind.LINEAR, OpKind.MATMUL}
    assert not any("was not searched" in note.reason for note in qm.report.notes)


# Backends


@pytest.mark.parametrize("target", ["x86-avx2", "x86-vnni"])
def test_an_onnx_file_has_the_codes_of_the_simulation(target: str, tmp_path: Path) -> None:
    exported = full().export_onnx(tmp_path / "model.onnx", target=target)
    assert sum(exported.fused.values()) == 10 and not exported.unfused
    if target == "x86-avx2":
        assert_same_codes(full(), exported.path, images(3))


def test_inductor_takes_the_form_with_floats_between() -> None:
    reference = full().lower("integer", integer_only=False)
    compiled_form = full().lower("inductor")
    with torch.no_grad():
        expected, out = reference(images(3)), compiled_form(images(3))
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


def test_observers_keep_the_function() -> None:
    gm, _ = annotated(*policies.elementwise_rules(), Rule(spec=EIGHT))
    run_passes(gm, [InsertObservers()])
    testing.assert_same_function(gm, testing.seeded(testing.Block()), testing.tokens())
