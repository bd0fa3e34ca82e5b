"""Errors of outputs: measures by kind of output, over batches."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant import policies
from fxquant.compiled.output_errors import (
    OutputComparison,
    OutputError,
    OutputKind,
    compare_outputs,
    kind_of,
)
from fxquant.testing import DIM, seeded, tokens
from fxquant.utils.notes import NoteKind


def error_of(reference: Tensor, output: Tensor, kind: OutputKind, batch: int = 4) -> OutputError:
    comparison = OutputComparison("output", kind)
    for pair in zip(reference.split(batch), output.split(batch), strict=True):
        comparison.add(*pair)
    return comparison.result()


def noisy(*shape: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(shape, generator=generator)
    return reference, reference + noise * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_measures_of_a_map_are_over_all_images(batch: int) -> None:
    reference, output = noisy(10, 1, 6, 6)
    error = error_of(reference, output, OutputKind.DENSE, batch)
    difference = (output - reference).double()
    assert error.mae == pytest.approx(float(difference.abs().mean()))
    assert error.largest == pytest.approx(float(difference.abs().max()))
    cosines = F.cosine_similarity(output.flatten(1), reference.flatten(1))
    assert error.cosine == pytest.approx(float(cosines.mean()), rel=1e-5)
    ratio = reference.double().square().sum() / difference.square().sum()
    assert error.sqnr == pytest.approx(10 * math.log10(float(ratio)))
    both, either = (output > 0.5) & (reference > 0.5), (output > 0.5) | (reference > 0.5)
    assert error.overlap == pytest.approx(float(both.sum() / either.sum()))
    assert error.agreement is None and error.shape == (1, 6, 6)
    assert "top-1" not in str(error) and "overlap" in str(error)


def test_a_map_beyond_zero_to_one_has_no_overlap() -> None:
    reference, output = noisy(8, 1, 4, 4)
    reference[7, 0, 0, 0] = 1.5
    assert error_of(reference, output, OutputKind.DENSE).overlap is None


def test_empty_areas_agree() -> None:
    dark = torch.full((4, 1, 3, 3), 0.25)
    assert error_of(dark, dark + 0.1, OutputKind.DENSE).overlap == 1
    assert error_of(dark, dark + 0.5, OutputKind.DENSE).overlap == 0


def test_logits_have_the_share_of_equal_classes() -> None:
    reference = torch.eye(4).repeat(2, 1)
    output = reference.clone()
    output[5] = torch.tensor([9.0, 1, 0, 0])
    error = error_of(reference, output, OutputKind.LOGITS)
    assert error.agreement == 7 / 8
    assert "same top-1 87.50%" in str(error)


def test_embeddings_have_the_share_of_equal_neighbours() -> None:
    angles = torch.tensor([0.0, 0.1, 1.0, 1.1, 2.0, 2.3])
    moved = torch.tensor([0.0, 0.1, 1.0, 1.75, 2.0, 2.3])  # 3 is nearer to 4 now
    one, two = (torch.stack([a.cos(), a.sin()], 1) for a in (angles, moved))
    error = error_of(one, 3 * two, OutputKind.EMBEDDING, batch=2)
    assert error.agreement == pytest.approx(4 / 6)  # 3, and 4 whose neighbour is 3 instead of 5
    assert "same nearest neighbour 66.67%" in str(error)
    assert error_of(one[:2], two[:2], OutputKind.EMBEDDING).agreement is None


def test_what_is_infinite_in_the_reference_is_left_out() -> None:
    reference = torch.tensor([[1.0, -torch.inf, 2.0], [3.0, 4.0, -torch.inf]])
    output = torch.tensor([[1.0, -torch.inf, 3.0], [3.0, 4.0, 7.0]])
    error = error_of(reference, output, OutputKind.LOGITS)
    assert error.mae == pytest.approx(1 / 4) and error.largest == 1
    assert error.sqnr == pytest.approx(10 * math.log10(30))


def test_equal_outputs_and_outputs_that_are_not_finite() -> None:
    reference, _ = noisy(4, 2, 3)
    same = error_of(reference, reference, OutputKind.DENSE)
    assert (same.mae, same.largest, same.sqnr) == (0, 0, math.inf)
    assert same.cosine == pytest.approx(1)
    worst = error_of(reference, torch.full_like(reference, torch.inf), OutputKind.DENSE)
    assert worst.sqnr == -math.inf and worst.mae == math.inf and worst.cosine == 0
    zero = torch.zeros(2, 3, 1)
    assert error_of(zero, zero, OutputKind.DENSE).cosine == 1
    assert error_of(zero, zero + 1, OutputKind.DENSE).cosine == 0
    for error in (same, worst):
        assert OutputError.from_dict(json.loads(json.dumps(error.to_dict()))) == error


@pytest.mark.parametrize(
    ("shape", "embedding", "kind"),
    [
        ((2, 5), False, "logits"),
        ((2, 5), True, "embedding"),
        ((2, 1), False, "dense"),
        ((2, 1), True, "dense"),
        ((2,), False, "dense"),
        ((2, 5, 3), False, "dense"),
        ((2, 1, 8, 8), False, "dense"),
    ],
)
def test_kinds_of_outputs(shape: tuple[int, ...], embedding: bool, kind: str) -> None:
    assert kind_of(torch.zeros(shape), embedding=embedding) == kind


def test_several_outputs_are_numbered() -> None:
    outputs = [torch.ones(4, 3), torch.ones(4, 3), torch.ones(4, 1, 2, 2), torch.tensor(1.0)]
    errors = compare_outputs(outputs, [2 * x for x in outputs], [1])
    assert [error.name for error in errors] == [f"output {i}" for i in range(4)]
    assert [error.kind for error in errors] == ["logits", "embedding", "dense", "dense"]
    assert all(error.cosine == pytest.approx(1) for error in errors)


class Maps(nn.Module):
    """Tokens as a map in 0..1, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(DIM, DIM), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.fc(x))
        return x.sigmoid(), x.mean(1)


def test_the_report_has_the_error_of_each_output() -> None:
    report = fxquant.compile(seeded(Maps()), [tokens(16)], policies.ptq4vit()).report
    dense, embedding = report.outputs
    assert (dense.kind, embedding.kind) == (OutputKind.DENSE, OutputKind.EMBEDDING)
    assert dense.overlap is not None and embedding.agreement is not None
    assert [note.site for note in report.notes if note.kind is NoteKind.OUTPUT] == [
        "output 0",
        "output 1",
    ]
    assert str(dense) in str(report) and "top-1" not in str(report)
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report


class Map(Maps):
    """The map alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def test_the_summary_has_the_error_of_a_map_and_the_noise_of_logits() -> None:
    report = fxquant.compile(seeded(Map()), [tokens(16)]).report
    (error,) = report.outputs
    assert error.sqnr == pytest.approx(report.output_sqnr)
    assert f"dB (cosine {error.cosine:.4f}, MAE {error.mae:.3g})" in report.summary()
    head = nn.Sequential(nn.Flatten(), nn.Linear(5 * DIM, 3))
    logits = fxquant.compile(seeded(head), [tokens(16)]).report
    assert logits.outputs[0].kind is OutputKind.LOGITS
    assert "cosine" not in logits.summary()


def test_a_report_without_outputs_still_loads() -> None:
    report = fxquant.compile(seeded(Map()), [tokens(16)]).report
    values = report.to_dict()
    del values["outputs"]
    older = type(report).from_dict(values)
    assert older.outputs == () and "cosine" not in older.summary()
