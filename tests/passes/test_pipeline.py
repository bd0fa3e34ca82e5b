"""The pipeline of passes: what it keeps, what it calls, and what its errors name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

import fxquant
from fxquant import passes, policies
from fxquant.calibration.observe import observe
from fxquant.config.recovery import Compensation
from fxquant.config.scale_search import ScaleSearch
from fxquant.config.vocabulary import Stage
from fxquant.errors import PassError
from fxquant.graph.dialect import aten
from fxquant.graph.nodes import get_parameter, stage
from fxquant.passes import (
    Comparison,
    InsertObservers,
    Note,
    NoteKind,
    PassResult,
    Pipeline,
    QuantizeBias,
)
from fxquant.passes import pipeline as pipeline_module
from fxquant.passes.canonical.canonicalize import CANONICAL
from fxquant.policies.policy import Rule
from fxquant.testing import DIM, op_names, seeded, tokens
from tests.helpers.refusals import refused
from tests.helpers.stages import EIGHT, annotated

LATE = replace(
    policies.ptq4vit(4, 4),
    reparameterize=True,
    bias_correction=True,
    compensation=Compensation(),
)
NAMES = [
    *(type(item).__name__ for item in CANONICAL),
    "MarkEmbeddings",
    "Reparameterize",
    "AssignSpecs",
    "InsertObservers",
    "Freeze",
    "SearchScales",
    "CorrectBias",
    "Compensate",
    "QuantizeBias",
]


def linear() -> nn.Module:
    return seeded(nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM)))


def test_a_late_failure_names_all_passes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: QuantizeBias, gm: fx.GraphModule) -> PassResult:
        raise LookupError("lost")

    monkeypatch.setattr(QuantizeBias, "run", fails)
    with pytest.raises(PassError, match=r"QuantizeBias failed \(LookupError: lost\)") as caught:
        fxquant.compile(linear(), [tokens(8)], LATE)
    already = str(caught.value).split("already run before it: ")[1].split(". Please")[0]
    assert already.split(", ") == ["capture", *NAMES[:-1]]


def test_a_pass_in_the_wrong_stage_names_those_before_it() -> None:
    run = Pipeline.capture(linear(), tokens())
    run.apply(passes.DropNoOps())
    text = "got FLOAT; already run: DropNoOps"
    with refused(PassError, text, got=Stage.FLOAT, expected=InsertObservers.requires):
        run.apply(InsertObservers())


def test_the_callback_sees_the_graph_after_each_pass() -> None:
    seen: list[tuple[str, Stage, str]] = []
    graphs: set[int] = set()

    def show(name: str, gm: fx.GraphModule) -> None:
        seen.append((name, stage(gm), str(gm.graph)))
        graphs.add(id(gm))

    plain = fxquant.compile(linear(), [tokens(8)], LATE)
    watched = fxquant.compile(linear(), [tokens(8)], LATE, on_pass=show)
    assert [name for name, _, _ in seen] == NAMES
    assert len(graphs) == 1
    stages = {name: stage for name, stage, _ in seen}
    assert stages["AssignSpecs"] is Stage.ANNOTATED and stages["InsertObservers"] is Stage.OBSERVED
    assert "quant" in seen[-1][2] and "quant" not in seen[0][2]
    assert torch.equal(watched(tokens(8)), plain(tokens(8)))


@dataclass(frozen=True)
class Remarks:
    """Changes nothing, and leaves a note and a comparison."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        note = Note(NoteKind.SKIPPED, "site", "why")
        return PassResult(0, (note,), (Comparison("site", "this", "error", 0.5),))


def test_notes_and_comparisons_carry_the_name_of_their_pass() -> None:
    run = Pipeline.capture(linear(), tokens())
    run.record("capture", PassResult(0, (Note(NoteKind.MODEL, "model", "odd"),)))
    result = run.apply(Remarks())
    assert [(note.step, note.kind) for note in run.notes] == [
        ("capture", NoteKind.MODEL),
        ("Remarks", NoteKind.SKIPPED),
    ]
    assert run.comparisons == result.comparisons
    assert run.comparisons == (Comparison("site", "this", "error", 0.5, step="Remarks"),)


def test_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Pipeline.capture(linear(), tokens())
    assert set(run.seconds) == {"capture"}
    clock = iter([1.0, 3.0, 10.0, 15.0, 20.0, 20.5])
    monkeypatch.setattr(pipeline_module.time, "perf_counter", lambda: next(clock))
    with run.phase("fit"):
        run.apply(Remarks())
    run.apply(Remarks(), "fit")
    with pytest.raises(RuntimeError, match="stop"), run.phase("search"):
        raise RuntimeError("stop")
    assert (run.seconds["fit"], run.seconds["search"]) == (7.0, 0.5)


def test_a_trial_leaves_the_graph_as_it_is() -> None:
    gm, _ = annotated(Rule(spec=EIGHT))
    seen: list[str] = []
    run, before = Pipeline(gm, on_pass=lambda name, _: seen.append(name)), op_names(gm)
    run.record("earlier", PassResult(0))
    trial = run.trial()
    trial.apply(InsertObservers())
    assert stage(trial.gm) is Stage.OBSERVED and stage(gm) is Stage.ANNOTATED
    assert op_names(gm) == before
    assert list(run.results) == ["earlier"] and not seen
    assert list(trial.results) == ["earlier", "InsertObservers"]
    weights = {name: value.data_ptr() for name, value in trial.gm.named_parameters()}
    assert (
        weights
        and weights.items()
        <= {name: value.data_ptr() for name, value in gm.named_parameters()}.items()
    )


def test_rows_of_an_earlier_pass_are_not_sampled_again() -> None:
    gm, _ = annotated(Rule(spec=EIGHT))
    batches = [(tokens(8), None)]
    known = observe(gm, batches, ScaleSearch()).samples
    assert known
    passes.run_passes(gm, [InsertObservers()])
    seen = observe(gm, batches, ScaleSearch(), samples=known)
    assert seen.samples is known and seen.images == 8
    observers = [m for name, m in gm.named_modules() if name.startswith("quant.")]
    assert observers
    passes.run_passes(gm, [passes.Freeze()])  # which raises where an observer has seen nothing


def test_products_without_a_quantized_form_are_known_by_their_kind() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.mixed = nn.Linear(DIM, DIM), nn.Bilinear(DIM, DIM, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return self.mixed(y, y)

    policy = policies.w8a8().with_rules(Rule(path="layer", arg="weight", spec=None))
    report = fxquant.compile(seeded(Net()), [tokens(8)], policy).report
    assert [site for site, _ in report.unsupported] == ["bilinear"]
    assert {note.kind for note in report.notes} >= {NoteKind.UNSUPPORTED, NoteKind.FLOAT}
    assert "1 product has no quantized form" in report.summary()


def test_an_error_of_the_callback_names_the_pass() -> None:
    def fails(name: str, gm: fx.GraphModule) -> None:
        if name == "Freeze":
            raise KeyError("lost")

    with pytest.raises(
        PassError, match=r"on_pass raised KeyError .* after Freeze: 'lost'"
    ) as error:
        fxquant.compile(linear(), [tokens(8)], "w8a8", on_pass=fails)
    assert isinstance(error.value.__cause__, KeyError)


def rename_node(gm: fx.GraphModule) -> None:
    next(iter(gm.graph.nodes)).name = "other"


def annotate(gm: fx.GraphModule) -> None:
    next(iter(gm.graph.find_nodes(op="call_function", target=aten.linear.default))).meta[
        "quant"
    ] = {}


def change_weight(gm: fx.GraphModule) -> None:
    with torch.no_grad():
        next(gm.parameters()).add_(1.0)


def replace_weight(gm: fx.GraphModule) -> None:
    node = next(iter(gm.graph.find_nodes(op="get_attr")))
    path, _, name = str(node.target).rpartition(".")
    setattr(gm.get_submodule(path), name, nn.Parameter(get_parameter(gm, node) * 2))


def feed_observers(gm: fx.GraphModule) -> None:
    gm(tokens(2))


@pytest.mark.parametrize(
    "edit", [rename_node, annotate, change_weight, replace_weight, feed_observers]
)
def test_a_callback_that_changes_the_graph_is_refused(
    edit: Callable[[fx.GraphModule], None],
) -> None:
    def change(name: str, gm: fx.GraphModule) -> None:
        if name == "InsertObservers":
            edit(gm)

    with pytest.raises(PassError, match=r"on_pass changed the graph .* after InsertObservers"):
        fxquant.compile(linear(), [tokens(8)], "w8a8", on_pass=change)


def test_a_callback_may_run_a_copy_and_the_graph_of_quantizers() -> None:
    outputs = []

    def run(name: str, gm: fx.GraphModule) -> None:
        runnable = copy.deepcopy(gm) if stage(gm) is Stage.OBSERVED else gm
        outputs.append(runnable(tokens(2)))

    plain = fxquant.compile(linear(), [tokens(8)], LATE)
    assert torch.equal(
        fxquant.compile(linear(), [tokens(8)], LATE, on_pass=run)(tokens(8)), plain(tokens(8))
    )
    assert len(outputs) == len(NAMES)


def test_a_callback_that_cannot_be_called_is_refused_before_long_work() -> None:
    with refused(PassError, "on_pass must be a function", got="print", expected="a function"):
        fxquant.compile(nn.Linear(DIM, 2), [tokens()], "w8a8", on_pass="print")  # type: ignore[arg-type]
