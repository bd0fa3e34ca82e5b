"""Reconstruction and compensation of networks with unusual outputs, masks, names and sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant import policies
from fxquant.config.recovery import Compensation, Reconstruction
from fxquant.config.spec import Scheme, TensorSpec
from fxquant.config.vocabulary import OpKind
from fxquant.errors import PolicyError
from fxquant.passes import Compensate, run_passes
from fxquant.policies.policy import Rule
from fxquant.quantizers import UniformQuantizer
from fxquant.reconstruction.blockwise import BlockwiseRunner
from fxquant.testing import DIM, seeded
from tests.helpers.refusals import refused
from tests.helpers.towers import BATCH, SHORT, Stack, Tower, frozen, reconstruct

TRAINED = Reconstruction(scope="network", weights="scales", block_loss="mse", **SHORT)


class Gives(Stack):
    """Gives something else than logits, made of them."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(super().forward(x))


def masked(logits: Tensor) -> Tensor:
    """The second class is none."""
    return logits.masked_fill(torch.tensor([False, True, False]), float("-inf"))


@pytest.mark.parametrize(
    "what",
    [
        lambda logits: logits[:, 0],
        lambda logits: (logits, logits.mean()),
        lambda logits: (logits, torch.cat((logits, logits))),
        masked,
    ],
    ids=["an entry an image", "and a scalar", "and two entries an image", "a class masked"],
)
@pytest.mark.parametrize("block_loss", ["mse", "fisher"])
def test_outputs_of_any_kind(what: Callable[[Tensor], Any], block_loss: str) -> None:
    gm = frozen(Gives(what))
    sides = BlockwiseRunner(gm, BATCH)
    assert run_passes(gm, [Compensate(sides, Compensation())])["Compensate"].changed
    result = reconstruct(gm, scope="network", block_loss=block_loss)
    assert result.changed == 1 and 0 < result.comparisons[0].error_ratio < 1


class Named(nn.Module):
    """Layers with the names of methods of torch's containers."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(DIM, DIM) for _ in range(3))
        self.pop = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        attention = (self.queries(x) @ self.keys(x).transpose(-2, -1)).softmax(-1)
        return self.pop(attention @ self.values(x)).mean(1)


def test_layers_may_have_any_name() -> None:
    policy = replace(policies.best(4, 4), reconstruction=TRAINED)
    compiled = fxquant.compile(seeded(Named()), [BATCH], policy)
    assert compiled.report.changes["Reconstruct"] == 1


def test_symmetric_quantizers_stay_symmetric(tmp_path: Path) -> None:
    """Else a file needs a subtraction before the matmul, which leaves its integer kernel."""
    trained = replace(TRAINED, scope="block", scale_rate=1e-2, held_out=0.0)
    policy = replace(policies.ptq4vit(4, 4, twin=False), reconstruction=trained)
    compiled = fxquant.compile(seeded(Stack()), [BATCH], policy)
    assert compiled.report.changes["Reconstruct"] >= 2
    signed = [
        entry
        for entry in compiled.plan
        if entry.op == OpKind.MATMUL and entry.spec is not None and entry.spec.symmetric
    ]
    coders = [compiled.graph_module.get_submodule(str(entry.quantizer)) for entry in signed]
    assert len(coders) == 6
    for coder in coders:
        assert isinstance(coder, UniformQuantizer) and coder.signed
        assert not bool(coder.zero_point.any())
    assert compiled.export_onnx(tmp_path / "model.onnx").unfused == ()


def test_values_too_large_to_square_are_left(tmp_path: Path) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) * 1e20).mean(1)

    gm = frozen(Large())
    result = run_passes(gm, [Compensate(BlockwiseRunner(gm, BATCH), Compensation())])["Compensate"]
    assert [skip.site for skip in result.notes] == ["two"]
    assert "overflow float32" in result.notes[0].reason
    assert result.changed == 1


def stem_error(gm: fx.GraphModule) -> float:
    """Squared error of what the first linear gives."""
    (stem,) = (node for node in gm.graph.nodes if node.name == "stem")
    found = fx.Interpreter(gm, garbage_collect_values=False)
    with torch.no_grad():
        found.run(BATCH)
        exact = seeded(Tower()).stem(BATCH)
    return float((found.env[stem] - exact).detach().square().sum())


def test_low_rank_changes_show_what_they_gain() -> None:
    """Of each product, as its error is in the end: the stem reads the same in both networks."""
    gm = frozen()
    error = stem_error(gm)
    result = reconstruct(gm, weights="low_rank", ranks=(3,), held_out=0.0)
    gains = {gain.site: gain.error_ratio for gain in result.comparisons if gain.choice == "rank 3"}
    assert len(gains) > 4
    assert gains["stem"] == pytest.approx(stem_error(gm) / error, rel=1e-3)


class Dense(Stack):
    """Its last product reads the tokens of all images in one row of rows."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.two(self.one(self.stem(x))))
        return self.head(x.reshape(-1, DIM)).reshape(*x.shape[:2], 3)


class Crossed(Stack):
    """There, images alternate token by token."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.two(self.one(self.stem(x))))
        rows = self.head(x.transpose(0, 1).reshape(-1, DIM))
        return rows.reshape(x.shape[1], -1, 3).transpose(0, 1)


def test_the_last_feature_is_compared_image_by_image() -> None:
    result = reconstruct(frozen(Dense()), block_loss="feature")
    assert result.changed and all(0 < gain.error_ratio < 1 for gain in result.comparisons)
    text = "is not laid out image by image: choose 'fisher' or 'mse'"
    with refused(PolicyError, text, edge="head"):
        reconstruct(frozen(Crossed()), block_loss="feature")
    assert reconstruct(frozen(Crossed()), block_loss="mse").changed


class Repeated(Stack):
    """One block after itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.one(self.one(self.stem(x)))).mean(1))


def test_what_is_not_trained_says_why(tmp_path: Path) -> None:
    log = Rule(fed_by="softmax", spec=TensorSpec(bits=4, scheme=Scheme.ADALOG))
    training = Reconstruction(**SHORT)
    policy = replace(policies.minmax(4, 4).with_rules(log), reconstruction=training)
    found = []
    for _ in range(2):  # the second takes what the first trained
        report = fxquant.compile(seeded(Repeated()), [BATCH], policy, cache=tmp_path).report
        found.append([note for note in report.notes if note.step == "Reconstruct"])
    reasons = [note.reason for note in found[0]]
    assert reasons.count("weight not trained: several products share it") == 6
    assert reasons.count("scale of lhs not trained: LogQuantizer has no trained form") == 2
    assert found[0] == found[1]
