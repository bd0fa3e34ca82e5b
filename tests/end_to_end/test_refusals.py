"""What is refused, and what is said of it: models, loaders, images, options, files of policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Policy, Reconstruction, Rule, TensorSpec, policies
from fxquant.config.allocation import Allocation, Budget
from fxquant.config.scale_search import ScaleSearch
from fxquant.config.vocabulary import OpKind
from fxquant.errors import (
    BatchError,
    CaptureError,
    EmptyLoaderError,
    FxQuantError,
    LoweringError,
    NonFiniteError,
    OutputError,
    PolicyError,
)
from fxquant.policies.policy_file import read_policy
from fxquant.testing import DIM, TOKENS, images, relative_error, seeded, tokens
from fxquant.utils.notes import NoteKind
from tests.helpers.refusals import refused

X = images(4, 16)
FLOATS, SHAPE = {"expected": torch.float32}, {"expected": (3, 16, 16)}
SEEDS = f"0..{2**63 - 1}"  # that torch's generators accept


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda model: model, r"graph_module\.quant\.\S+"),
        (lambda model: nn.Sequential(model, nn.Flatten()), r"0\.graph_module\.quant\.\S+"),
        (lambda model: model.graph_module, r"quant\.\S+"),
        (lambda model: model.lower("integer"), r"\(root\)"),
    ],
    ids=["compiled", "inside another", "graph", "lowered"],
)
def test_a_quantized_model_is_not_quantized_again(
    quantized: fxquant.CompiledModel, change: Callable[[nn.Module], nn.Module], where: str
) -> None:
    with refused(CaptureError, rf"quantized already \(module {where}\)") as caught:
        fxquant.compile(change(quantized).eval(), [X])
    assert f"(module {caught.value.edge or '(root)'})" in str(caught.value)


class Exhausted:
    """A loader that can be iterated again, and then has nothing left."""

    def __init__(self) -> None:
        self._batches = iter([X, X])

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._batches


def test_a_loader_that_is_empty_when_read_again_is_explained(vit: nn.Module) -> None:
    with pytest.raises(EmptyLoaderError, match="no batch when it was read again"):
        fxquant.compile(vit, Exhausted(), policies.mptq_vit(6, 6))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, nn.Module.bfloat16])
def test_another_type_of_numbers_is_refused(
    quantized: fxquant.CompiledModel, cast: Callable[[nn.Module], nn.Module]
) -> None:
    before = quantized(X)
    text = "was quantized in float32, got a cast to torch"
    with refused(LoweringError, text, expected=torch.float32) as caught:
        cast(quantized)
    assert caught.value.got in (torch.float16, torch.float64, torch.bfloat16)
    assert torch.equal(quantized.float().to("cpu")(X), before)


class Mixing(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return y


@pytest.mark.parametrize("batch_first", [False, True])
def test_images_that_change_each_others_outputs_are_noted(batch_first: bool) -> None:
    report = fxquant.compile(seeded(Mixing(batch_first)), [tokens()], "w8a8").report
    found = [(n.step, n.site) for n in report.notes if "other images of its batch" in n.reason]
    assert found == ([] if batch_first else [("capture", "model")])


def test_an_output_without_elements_compiles() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(DIM, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return y, y[:, :0]

    compiled = fxquant.compile(seeded(Empty()), [tokens()], "w8a8")
    assert compiled(tokens())[1].shape == (len(tokens()), 0, 3)


def test_a_model_that_takes_no_single_image_is_noted() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(DIM, DIM), nn.Linear(TOKENS * DIM, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.layer(x).squeeze().flatten(-2)).sum(1)
            return y

    report = fxquant.compile(seeded(Squeezed()), [tokens()], "w8a8").report
    (note,) = report.notes
    assert (note.step, note.kind, note.site) == ("capture", NoteKind.MODEL, "model")
    assert "does not run on one image alone" in note.reason


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(DIM, 4)

    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(x * mask) * scale


def test_a_model_of_two_inputs_is_explained() -> None:
    text = r"takes 2 inputs \(x, mask\), and one image tensor"
    with refused(CaptureError, text, got=("x", "mask")):
        fxquant.compile(seeded(TwoInputs()), [tokens()])


@pytest.mark.parametrize("size", [8, 24])
def test_images_of_another_size_are_explained_at_run_time(
    quantized: fxquant.CompiledModel, size: int
) -> None:
    shape = quantized.image_shape
    with refused(BatchError, got=(2, 3, size, size), expected=shape):
        quantized(torch.randn(2, 3, size, size))
    with refused(BatchError, got=[1.0], expected=Tensor):
        quantized([1.0])


def test_a_model_that_runs_on_images_of_any_size_refuses_another_size_than_compiled_for() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((2, 3)))

    model = seeded(Pooled())
    compiled = fxquant.compile(model, [X])
    assert model(X[..., :8]).shape == (4, 5)  # no operator of the graph would fail
    assert [len(compiled(x)) for x in (X[:1], X, torch.cat([X, X]))] == [1, 4, 8]
    for module in (compiled, compiled.lower("integer")):
        with refused(BatchError, got=(4, 3, 16, 8), expected=(3, 16, 16)):
            module(X[..., :8])


@pytest.mark.parametrize(
    ("change", "error", "fields", "text"),
    [
        (lambda x: x * torch.nan, NonFiniteError, {}, "^the images hold NaN or infinity"),
        (lambda x: x.to(torch.uint8), BatchError, FLOATS | {"got": torch.uint8}, None),
        (
            lambda x: x.half(),
            BatchError,
            FLOATS | {"got": torch.float16},
            r"got images in torch\.float16: call images\.float",
        ),
        (lambda x: x.double(), BatchError, FLOATS | {"got": torch.float64}, None),
        (
            lambda x: x[:, :, 1:],
            BatchError,
            SHAPE | {"got": (4, 3, 15, 16)},
            r"for images of shape \(B, 3, 16, 16\), got \(4, 3, 15, 16\): resize them",
        ),
        (lambda x: x[0], BatchError, SHAPE | {"got": (3, 16, 16)}, None),
        (lambda x: x[:0], BatchError, SHAPE | {"got": (0, 3, 16, 16)}, "no image: resize"),
        (lambda x: x.sum(), BatchError, SHAPE | {"got": ()}, None),
        (lambda x: [x], BatchError, {"expected": Tensor}, "^the model takes a tensor .* got list"),
    ],
)
@pytest.mark.parametrize("backend", ["simulation", "integer"])
def test_images_that_make_no_sense_are_refused_at_run_time(
    quantized: fxquant.CompiledModel,
    backend: str,
    change: Callable[[Tensor], Any],
    error: type[FxQuantError],
    fields: dict[str, object],
    text: str | None,
) -> None:
    images = change(X)
    if backend == "integer":
        lowered = quantized.lower(backend)
        with refused(error, text, **fields):
            lowered(images)
        with refused(error, text, **fields):
            lowered(x=images)
    elif error is NonFiniteError:  # which the simulation shows, as the float model does
        assert bool(quantized(images).isnan().all())
    elif not isinstance(images, Tensor) or images.ndim == 0 or len(images):
        with refused(error, text, **fields):
            quantized(images)
    else:
        assert quantized(images).shape == (0, 5)


def test_a_mask_that_the_images_make_says_what_to_do() -> None:
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            q, dark = self.q(x), (x.mean(-1) > x.mean((1, 2))[:, None]).float().log()
            y: Tensor = self.out((q @ q.mT + dark[:, None]).softmax(-1) @ q)
            return y

    model, policy = seeded(Hiding()), policies.w8a8_full()
    with pytest.raises(NonFiniteError, match=r"attention masks are made of.*rules `op: add`"):
        fxquant.compile(model, [tokens()], policy)
    floats = [Rule(op=kind, spec=None) for kind in (OpKind.ADD, OpKind.SOFTMAX)]
    compiled = fxquant.compile(model, [tokens()], policy.with_rules(*floats))
    assert relative_error(compiled(tokens()), model(tokens())) < 0.1


@pytest.mark.parametrize(
    "rules", [(Rule(spec=None),), (Rule(spec=TensorSpec(), path="no", optional=True),)]
)
def test_a_policy_that_quantizes_nothing_is_refused(
    vit: nn.Module, rules: tuple[Rule, ...]
) -> None:
    with pytest.raises(PolicyError, match="quantizes nothing of this model: 20 x 'left float"):
        fxquant.compile(vit, [X], Policy(name="nothing", rules=rules))


def test_a_folder_that_is_a_file_is_named(quantized: fxquant.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with refused(OutputError, "model is a file", got=tmp_path / "model" / "model.safetensors"):
        quantized.save(tmp_path / "model")


@pytest.mark.parametrize("strict", [True, False])
def test_the_result_can_be_exported_again(quantized: fxquant.CompiledModel, strict: bool) -> None:
    batch = torch.randn(2, *quantized.image_shape)
    program = torch.export.export(quantized, (batch,), strict=strict)
    assert torch.equal(program.module()(batch), quantized(batch))


@pytest.mark.parametrize(
    ("make", "got", "expected", "text"),
    [
        (lambda: policies.mptq_vit(budget=5), 5, Budget, None),
        (
            lambda: policies.ptq4vit(search="fast"),
            "fast",
            ScaleSearch,
            "^search must be a ScaleSearch, .* got 'fast'",
        ),
        (lambda: policies.ptq4vit(search=None), None, ScaleSearch, None),
        (
            lambda: policies.aiqvit(reconstruction=5),
            5,
            Reconstruction,
            "^reconstruction must be a Reconstruction, got 5",
        ),
        (lambda: ScaleSearch(seed=2**70), 2**70, SEEDS, r"^seed must be at most 2\^63 - 1"),
        (lambda: Allocation(budget=Budget(mean_bits=4), seed=2**63), 2**63, SEEDS, None),
        (
            lambda: ScaleSearch(low=1e-300),
            (1e-300, ScaleSearch().high),
            "1e-06 <= low < 1 <= high <= 10",
            "^the grid needs 1e-06 <= low < 1",
        ),
    ],
)
def test_wrong_options_of_presets_raise(
    make: Callable[[], object], got: object, expected: object, text: str | None
) -> None:
    with refused(PolicyError, text, got=got, expected=expected):
        make()


@pytest.mark.parametrize(
    ("preset", "flag", "value"),
    [
        (policies.w8a8, "full", "no"),
        (policies.mptq_vit, "full", "no"),
        (policies.ptq4vit, "twin", "no"),
        (policies.ptq4vit, "reparameterize", 1),
        (policies.ptq4vit, "bias_correction", None),
    ],
)
def test_wrong_flags_of_presets_raise(
    preset: Callable[..., Policy], flag: str, value: object
) -> None:
    with refused(PolicyError, got=value, expected=(True, False)):
        preset(**{flag: value})


@pytest.mark.parametrize(
    "text",
    [
        "name: a\nrules: &r\n  - *r\n",
        "&p\nname: a\nsearch: *p\nrules: [{spec: {bits: 8}}]\n",
        "rules: " + "[" * 30 + "]" * 30,
        "rules: " + "[" * 5000 + "]" * 5000,
    ],
    ids=["list in itself", "mapping in itself", "deep", "beyond the stack"],
)
def test_yaml_that_nests_without_end_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(PolicyError, match="nested too deeply, or an alias"):
        read_policy(tmp_path / "policy.yaml")


def test_a_cache_that_is_no_folder_s_path(vit: nn.Module) -> None:
    text = "cache must be the path of a folder, or None, got 5"
    with refused(OutputError, text, got=5, expected=(str, Path, None)):
        fxquant.compile(vit, [X], cache=5)  # type: ignore[arg-type]


def test_images_that_a_compiled_model_does_not_take_are_explained(
    quantized: fxquant.CompiledModel,
) -> None:
    text = r"float images, got torch\.uint8: convert and normalise"
    with refused(BatchError, text, **FLOATS, got=torch.uint8):
        quantized(X.to(torch.uint8))
    with refused(BatchError, **SHAPE, got=(4, 3, 16, 8)):
        quantized(X[..., :8])
