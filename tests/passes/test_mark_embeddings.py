"""Outputs that are embeddings are marked, and every loss compares them by squared distance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import policies
from fxquant.calibration.network_loss import NetworkLoss
from fxquant.config.recovery import BlockLoss, Reconstruction, Scope
from fxquant.config.scale_search import GradientLoss, Metric, ScaleSearch
from fxquant.config.vocabulary import Stage
from fxquant.errors import PassError
from fxquant.graph.fingerprint import fingerprint
from fxquant.graph.meta import EMBEDDINGS
from fxquant.passes import InsertObservers, MarkEmbeddings, run_passes
from fxquant.passes.canonical.canonicalize import CANONICAL
from fxquant.policies.policy import Policy, Rule
from fxquant.policies.policy_file import policy_to_dict
from fxquant.reconstruction.blockwise import embedding_names
from fxquant.testing import DIM, assert_pass, seeded, tokens
from fxquant.utils.notes import NoteKind
from tests.helpers.refusals import refused
from tests.helpers.sampling import ALL
from tests.helpers.stages import EIGHT, FOUR, annotated, canonical


class Towers(nn.Module):
    """A map, an embedding and logits of tokens, in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(DIM, DIM), nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.body(x))
        return {"map": x, "parts": [x.mean(1), x[:, 0].argmax(1)], "logits": self.head(x[:, 0])}


class Embedder(nn.Module):
    """A pooled embedding of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(DIM, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.two(self.one(x).relu())).mean(1)


def test_embeddings_are_marked_and_outputs_without_logits_noted() -> None:
    model = seeded(Towers())
    gm, result = assert_pass(model, tokens(), MarkEmbeddings(), before=CANONICAL, changed=1)
    assert EMBEDDINGS.get(gm) == {1}
    assert {note.kind for note in result.notes} == {NoteKind.OUTPUT}
    assert [note.site for note in result.notes] == ["output 0", "output 1"]
    shape, embedding = (note.reason for note in result.notes)
    assert shape.startswith("its shape (B, 5, 8) is not that of logits")
    assert embedding.startswith("it counts as an embedding (B, 8), since it is read from")
    assert all("gaussian" in reason for reason in (shape, embedding))
    assert embedding_names(gm) == {"output.1"}


def test_a_classifier_has_neither_a_mark_nor_a_note() -> None:
    gm = canonical(nn.Sequential(nn.Flatten(), nn.Linear(5 * DIM, 3)), tokens())
    result = run_passes(gm, [MarkEmbeddings()])["MarkEmbeddings"]
    assert not result.changed and not result.notes and not EMBEDDINGS.get(gm)


def test_the_wrong_stage_raises() -> None:
    gm, _ = annotated(Rule(spec=EIGHT))
    with refused(PassError, got=Stage.ANNOTATED, expected=Stage.FLOAT):
        run_passes(gm, [MarkEmbeddings()])


def test_the_distance_of_embeddings_is_the_squared_one() -> None:
    gm = canonical(Embedder(), tokens())
    node = next(node for node in gm.graph.nodes if node.name == "norm")

    def moved(*args: Any) -> Tensor:
        return torch.ops.aten.layer_norm.default(*args) + 1

    by_divergence = NetworkLoss(gm, tokens(4), GradientLoss.MARGIN).changed({node: moved})
    run_passes(gm, [MarkEmbeddings()])
    by_distance = NetworkLoss(gm, tokens(4), GradientLoss.MARGIN).changed({node: moved})
    assert by_divergence == pytest.approx(0, abs=1e-6)  # a shift of all logits changes no share
    assert by_distance == pytest.approx(4, rel=1e-4)


def test_losses_of_marked_embeddings_are_kept_apart_in_caches() -> None:
    gm, _ = annotated(Rule(spec=EIGHT), model=Embedder())
    run_passes(gm, [InsertObservers()])
    gm(tokens())
    before = fingerprint(gm, tokens())
    EMBEDDINGS.set(gm, frozenset())
    assert fingerprint(gm, tokens()) == before
    EMBEDDINGS.set(gm, frozenset({0}))
    assert fingerprint(gm, tokens()) != before


def by_search(loss: str) -> Policy:
    search = ScaleSearch(metric=Metric.FISHER, loss=loss, rows=ALL.rows)
    return Policy(name="searched", rules=(Rule(spec=FOUR),), search=search)


@pytest.mark.parametrize("loss", ["margin", "argmax", "sampled"])
def test_an_embedding_is_searched_by_the_gaussian_loss_whatever_the_policy_says(loss: str) -> None:
    model = seeded(Embedder())
    gaussian, other = (
        fxquant.compile(model, [tokens(8)], by_search(kind)) for kind in ("gaussian", loss)
    )
    assert torch.equal(gaussian(tokens(4)), other(tokens(4)))
    (note,) = (note for note in other.report.notes if note.kind is NoteKind.OUTPUT)
    assert note.site == "output 0" and note.step == "MarkEmbeddings"


def test_logits_are_searched_by_the_loss_that_the_policy_says() -> None:
    model = seeded(nn.Sequential(Embedder(), nn.Linear(8, 3)))
    margin, gaussian = (
        fxquant.compile(model, [tokens(8)], by_search(kind)) for kind in ("margin", "gaussian")
    )
    assert not torch.equal(margin(tokens(4)), gaussian(tokens(4)))
    assert not [note for note in margin.report.notes if note.kind is NoteKind.OUTPUT]


@pytest.mark.parametrize("block_loss", ["fisher", "mse"])
def test_training_compares_embeddings_by_squared_error(block_loss: str, tmp_path: Path) -> None:
    """With one block, ``mse`` and ``fisher`` differ by the divergence of logits alone."""
    models = []
    for name in ("mse", block_loss):
        options = Reconstruction(
            scope="network", block_loss=name, iterations=8, held_out=0.0, drop=0.0
        )
        policy = Policy(name="trained", rules=(Rule(spec=FOUR),), reconstruction=options)
        models.append(fxquant.compile(seeded(Embedder()), [tokens(16)], policy))
    assert torch.equal(*(model(tokens(4)) for model in models))


def test_a_policy_without_losses_marks_nothing() -> None:
    report = fxquant.compile(seeded(Embedder()), [tokens(8)], policies.minmax()).report
    assert report.changes["MarkEmbeddings"] == 1
    assert not [note for note in report.notes if note.kind is NoteKind.OUTPUT]


@pytest.mark.parametrize(
    ("model", "logits"), [(Towers(), True), (Embedder(), False), (nn.Linear(DIM, 3), False)]
)
def test_networks_without_logits_have_a_training_of_their_own(
    model: nn.Module, logits: bool
) -> None:
    policy = Policy(
        name="p",
        rules=(Rule(spec=FOUR),),
        reconstruction=Reconstruction(scope=Scope.NETWORK, iterations=4, block_loss=BlockLoss.MSE),
        dense_reconstruction=Reconstruction(iterations=4, block_loss=BlockLoss.MSE),
    )
    assert policy.trains and policy.recovers and policy.compares_outputs
    compiled = fxquant.compile(seeded(model), [tokens(24)], policy)
    sites = {item.site for item in compiled.report.comparisons} | {
        note.site for note in compiled.report.notes if note.step == "Reconstruct"
    }
    assert ("network" in sites) == logits
    assert compiled.policy == policy_to_dict(policy)


def test_one_training_serves_all_outputs_where_no_other_is_named() -> None:
    training = Reconstruction(iterations=4)
    policy = Policy(name="p", rules=(Rule(spec=FOUR),), reconstruction=training)
    assert policy.for_outputs(logits=False).reconstruction is training
    dense = replace(policy, reconstruction=None, dense_reconstruction=training)
    assert dense.trains and not dense.for_outputs(logits=True).trains
    assert dense.for_outputs(logits=False).reconstruction is training
