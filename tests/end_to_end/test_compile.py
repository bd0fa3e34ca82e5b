"""``compile()`` end to end: what it takes, what it refuses, what it reports."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxquant
from fxquant import Policy, Rule, TensorSpec, policies, testing
from fxquant.config.scale_search import Metric
from fxquant.errors import (
    BatchError,
    CaptureError,
    EmptyLoaderError,
    FxQuantError,
    LoweringError,
    NonFiniteError,
    NothingToQuantizeError,
    PolicyError,
    TrainingModeError,
    UnusedRuleError,
)
from fxquant.testing import DIM, images, relative_error, seeded, tokens
from tests.helpers.refusals import refused


def test_the_quantized_model_is_close_to_the_float_one(
    vit: nn.Module, quantized: fxquant.CompiledModel
) -> None:
    for batch in (1, 4):
        x = images(batch, 16)
        assert relative_error(quantized(x), vit(x)) < 0.1
    assert not torch.equal(quantized(x), vit(x))


def test_swin(swin: nn.Module) -> None:
    x = images(2, 32)
    model = fxquant.compile(swin, [x])
    assert relative_error(model(x), swin(x)) < 0.1
    assert relative_error(model(images(5, 32)), swin(images(5, 32))) < 0.2
    assert model.report.left_float == ()


def test_the_users_model_is_not_changed(vit: nn.Module) -> None:
    before = copy.deepcopy(vit.state_dict())
    flags = [p.requires_grad for p in vit.parameters()]
    fxquant.compile(vit, [images(2, 16)], "minmax")
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())
    assert [p.requires_grad for p in vit.parameters()] == flags and not vit.training


X = images(4, 16)
LABELS = torch.arange(4)


@pytest.mark.parametrize(
    "loader",
    [
        [X[:2], X[2:]],
        [(X[:2], LABELS[:2]), [X[2:], LABELS[2:]]],
        [{"pixel_values": X, "labels": LABELS}],
        ({"image": x[None]} for x in X),
        DataLoader(TensorDataset(X, LABELS), batch_size=3),
        DataLoader(TensorDataset(X), batch_size=4),
        (x[None] for x in X),
        X,
    ],
    ids=["tensors", "pairs", "dict", "dicts", "loader", "no labels", "generator", "tensor"],
)
def test_any_loader_gives_the_same_model(
    vit: nn.Module, quantized: fxquant.CompiledModel, loader: Any
) -> None:
    model = fxquant.compile(vit, loader)
    assert model.report.images == 4
    # Batches of another size round differently in the last bit of the activations.
    assert relative_error(model(X), quantized(X)) < 0.02


def test_policies_of_all_kinds_are_taken(tmp_path: Path) -> None:
    model = seeded(nn.Linear(DIM, DIM))
    rules = {"name": "four", "rules": [{"spec": {"bits": 4}}]}
    path = tmp_path / "four.yaml"
    path.write_text("name: four\nrules:\n- spec:\n    bits: 4\n")
    policy = Policy(name="four", rules=(Rule(spec=TensorSpec(bits=4)),))
    outputs = []
    for given in (rules, path, str(path), policy):
        compiled = fxquant.compile(model, [tokens()], given)
        assert {entry.spec for entry in compiled.plan} == {TensorSpec(bits=4)}
        outputs.append(compiled(tokens()))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_symbolically_traced_model_compiles() -> None:
    model = fx.symbolic_trace(seeded(nn.Sequential(nn.Linear(DIM, DIM), nn.GELU()))).eval()
    assert relative_error(fxquant.compile(model, [tokens()])(tokens()), model(tokens())) < 0.05


@pytest.mark.parametrize(
    "make", [testing.PerHeadAttention, testing.TorchAttention, testing.KvAttention, testing.Block]
)
def test_every_form_of_attention_compiles(make: Any) -> None:
    model = seeded(make())
    compiled = fxquant.compile(model, [tokens(8)])
    assert compiled.report.left_float == ()
    assert relative_error(compiled(tokens(8)), model(tokens(8))) < 0.1


def test_gradients_reach_the_images(quantized: fxquant.CompiledModel) -> None:
    x = images(2, 16).requires_grad_()
    quantized(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


# What it reports


@pytest.mark.parametrize("quick", [True, False])
def test_progress_goes_to_stderr_and_is_quiet_when_quick(
    vit: nn.Module,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quick: bool,
) -> None:
    # Not by the clock: a busy machine may take longer than two seconds over anything.
    monkeypatch.setattr("fxquant.utils.progress.QUIET_SECONDS", math.inf if quick else -1.0)
    fxquant.compile(vit, [X], progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("capture: " in captured.err) is not quick
    assert not quick or captured.err == ""


# What it refuses


def bad(value: Any) -> Any:
    x = X.clone()
    x[1, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], EmptyLoaderError, "gave no batch"),
        (iter(()), EmptyLoaderError, "gave no batch"),
        ([X, bad(float("nan"))], NonFiniteError, "NaN or infinity in image 1 of .* batch 1,"),
        ([bad(float("inf"))], NonFiniteError, "NaN or infinity in image 1 of .* batch 0,"),
    ],
)
def test_unusable_data_is_explained(
    vit: nn.Module, loader: Any, error: type[FxQuantError], message: str
) -> None:
    with refused(error, message):
        fxquant.compile(vit, loader)


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (5, None),
        ("images", "calib_loader must be an iterable of batches, got str; wrap a single batch"),
        ({"image": X}, r"got a dict with keys \['image'\]"),
    ],
)
def test_what_is_no_loader_is_explained(vit: nn.Module, loader: Any, text: str | None) -> None:
    with refused(BatchError, text, got=loader, expected="an iterable of batches"):
        fxquant.compile(vit, loader)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"picture": X}, r"pixel_values.*got a dict with keys \['picture'\]"),
        ((LABELS.tolist(), X), r"got tuple of \['list', 'Tensor'\]"),
    ],
)
def test_what_is_no_batch_is_explained(vit: nn.Module, batch: Any, text: str) -> None:
    with refused(BatchError, text, got=batch, expected=Tensor):
        fxquant.compile(vit, [batch])


@pytest.mark.parametrize(
    ("batches", "got", "expected", "text"),
    [
        ([X.to(torch.uint8)], torch.uint8, torch.float32, "torch.uint8; convert and normalise"),
        ([X.double()], torch.float64, torch.float32, r"images are float64.*images\.float\(\)"),
        ([X[:0]], (0, 3, 16, 16), "(B, …) with B >= 1", None),
        ([X[0, 0, 0]], (16,), "(B, …) with B >= 1", r"shape \(16,\); add a batch dimension"),
        (
            [X, X[..., :8]],
            (3, 16, 8),
            (3, 16, 16),
            r"shape \(3, 16, 8\), the first batch \(3, 16, 16\)",
        ),
        (
            [X, X.half()],
            torch.float16,
            torch.float32,
            r"type torch.float16, the first batch torch.float32; give all",
        ),
        ([images(2, 24)], (2, 3, 24, 24), None, r"does not take images of shape \(2, 3, 24, 24\)"),
        ([X[:, :1]], (4, 1, 16, 16), None, None),
    ],
)
def test_images_that_the_model_does_not_take_are_explained(
    vit: nn.Module, batches: list[Tensor], got: object, expected: object, text: str | None
) -> None:
    with refused(BatchError, text, got=got, expected=expected):
        fxquant.compile(vit, batches)


def test_unusable_models_are_explained() -> None:
    block = seeded(testing.Block())
    with refused(TrainingModeError, edge=""):
        fxquant.compile(copy.deepcopy(block).train(), [tokens()])
    damaged = copy.deepcopy(block)
    damaged.fc1.weight.data[0] = float("nan")
    with refused(NonFiniteError, edge="fc1.weight"):
        fxquant.compile(damaged, [tokens()])
    with refused(NothingToQuantizeError):
        fxquant.compile(nn.ReLU().eval(), [tokens()])
    with refused(CaptureError, got="vit", expected=nn.Module):
        fxquant.compile("vit", [tokens()])  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="meta device"):
        fxquant.compile(copy.deepcopy(block).to("meta"), [tokens()])
    with warnings.catch_warnings(action="ignore"):  # torch says that its future is elsewhere
        scripted = torch.jit.trace(copy.deepcopy(block), tokens())
    with pytest.raises(CaptureError, match="TorchScript"):
        fxquant.compile(scripted, [tokens()])


def test_activations_that_overflow_name_the_edge() -> None:
    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(1 / (x - 1))

    x = tokens()
    x[1, 0, 0] = 1.0
    with refused(NonFiniteError, edge="layer__input"):
        fxquant.compile(seeded(Overflow()), [tokens(), x])


def test_a_model_that_gives_nan_is_refused() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sqrt()

    with pytest.raises(NonFiniteError, match="the float model itself outputs NaN"):
        fxquant.compile(seeded(Root()), [tokens()])


def test_a_random_model_is_refused() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.rand_like(x)

    with pytest.raises(CaptureError, match="draws random numbers"):
        fxquant.compile(seeded(Random()), [tokens()])


def test_a_rule_that_matches_nothing_is_an_error(vit: nn.Module) -> None:
    policy = fxquant.policies.w8a8().with_rules(Rule(path="blocks.7.*", spec=None))
    with refused(UnusedRuleError, r"^rule 1 \(path: blocks\.7\.\*\) matches", got=policy.rules[0]):
        fxquant.compile(vit, [X], policy)


def test_a_model_made_in_inference_mode_compiles() -> None:
    with torch.inference_mode():
        model = seeded(testing.Block())
        labelled = [(tokens(4), torch.tensor([0, 1, 2, 3]))]

        def loss(outputs: Tensor, labels: Tensor | None) -> Tensor:
            assert labels is not None
            return F.cross_entropy(outputs.mean(1), labels, reduction="sum")

        compiled = fxquant.compile(model, labelled, policies.ptq4vit(), loss=loss)
        assert relative_error(compiled(tokens()), model(tokens())) < 0.1


def test_a_loss_that_nothing_reads_is_an_error(vit: nn.Module) -> None:
    text = r"uses no gradient.*hessian or fisher"
    for policy, metric in (("w8a8", None), (policies.base_ptq(), Metric.COSINE)):
        with refused(PolicyError, text, got=metric, expected=(Metric.HESSIAN, Metric.FISHER)):
            fxquant.compile(vit, [torch.randn(2, 3, 16, 16)], policy, loss=lambda y, _: y.sum())


def test_an_unknown_backend_is_an_error(quantized: fxquant.CompiledModel) -> None:
    text = "'integr'; did you mean 'integer'"
    with refused(LoweringError, text, got="integr", expected=("integer", "inductor")):
        quantized.lower("integr")


# Memory


def test_batches_are_not_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def loader(count: int) -> Iterator[Tensor]:
        nonlocal most
        for i in range(count):
            most = max(most, sum(ref() is not None for ref in alive))
            batch = tokens() + i
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    fxquant.compile(seeded(nn.Linear(DIM, DIM)), loader(12))
    # The first batch, for the report, and the one before.
    assert len(alive) == 12 and most <= 2
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0
