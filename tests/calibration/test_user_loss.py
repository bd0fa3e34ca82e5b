"""Errors of a loss function of the user that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant import policies, testing
from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.errors import CalibrationError
from fxquant.testing import DIM, images, seeded, tokens
from tests.helpers.refusals import refused
from tests.helpers.sampling import sampled

X = torch.randn(4, DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("metric", [Metric.HESSIAN, Metric.FISHER])
@pytest.mark.parametrize(
    ("loss", "is_size", "text"),
    [
        (lambda y, _: (y - y).sqrt().sum(), math.isnan, None),
        (
            lambda y, _: (y - y + 1e-40).sqrt().log().sum(),
            lambda size: not math.isfinite(size),
            None,
        ),
        (
            lambda y, _: (y * 1e30).sum(),
            lambda size: size == pytest.approx(1e30),
            r"gradient .* at product linear reaches 1\.0e\+30 in a batch",
        ),
    ],
    ids=["nan", "infinite", "large"],
)
def test_a_gradient_without_a_finite_square_raises(
    loss: Callable[..., Tensor],
    is_size: Callable[[float], bool],
    text: str | None,
    metric: Metric,
) -> None:
    with refused(CalibrationError, text, edge="linear", expected="<= 1e+15") as caught:
        sampled(seeded(nn.Linear(DIM, 4)), X, search=ScaleSearch(metric=metric), loss=loss)
    assert isinstance(caught.value.got, float) and is_size(caught.value.got)


@pytest.mark.parametrize("metric", [Metric.HESSIAN, Metric.FISHER])
@pytest.mark.parametrize(
    "loss",
    [
        lambda y, _: torch.tensor(1.0, requires_grad=True),
        lambda y, _: (y * 0).sum(),
        lambda y, _: (y * 1e-30).sum(),
    ],
    ids=["constant", "zero", "tiny"],
)
def test_a_gradient_that_is_zero_everywhere_raises(
    loss: Callable[..., Tensor], metric: Metric
) -> None:
    with pytest.raises(CalibrationError, match=r"zero at all 1 products, for all 8 images"):
        sampled(seeded(nn.Linear(DIM, 4)), X, X, search=ScaleSearch(metric=metric), loss=loss)


def test_a_gradient_in_one_batch_is_enough() -> None:
    def hinge(y: Tensor, _: Tensor | None) -> Tensor:
        return y.sum() if bool((y.detach() > -1e9).all()) and len(y) == 2 else (y * 0).sum()

    (sample,) = sampled(seeded(nn.Linear(DIM, 4)), X, X[:2], X, loss=hinge).values()
    assert sample.gradient is not None


def needs_labels(y: Tensor, labels: Tensor | None) -> Tensor:
    return F.cross_entropy(y, labels)  # type: ignore[arg-type]


def in_place(y: Tensor, _: Tensor | None) -> Tensor:
    one = y.exp()
    total = one.sum()
    one.zero_()
    return total


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (needs_labels, "TypeError"),
        (lambda y, _: y[:, 99].sum(), "IndexError"),
        (lambda y: y.sum(), "TypeError"),
        (lambda y, _: y["logits"].sum(), "IndexError"),
        (in_place, "RuntimeError in its backward pass"),
    ],
    ids=["labels", "index", "arguments", "key", "in place"],
)
@pytest.mark.parametrize("labelled", [False, True])
def test_errors_of_the_loss_are_told_as_its_own(
    loss: Callable[..., Tensor], kind: str, labelled: bool
) -> None:
    labels = torch.tensor([0, 1, 2, 9]) if labelled else None  # class 9 is not there
    if labelled and loss is needs_labels:
        kind = "IndexError"
    given = r"labels of shape \(4,\) and type torch.int64" if labelled else "labels None, since"
    message = rf"loss given to compile\(\) raised {kind} \((.|\n)*called as .*{given}"
    with pytest.raises(CalibrationError, match=message) as error:
        sampled(seeded(nn.Linear(DIM, 4)), X, labels=labels, loss=loss)
    assert error.value.__cause__ is not None


def test_a_complex_loss_raises() -> None:
    with refused(CalibrationError, expected="one real number with a gradient"):
        sampled(seeded(nn.Linear(DIM, 4)), X, loss=lambda y, _: (y * 1j).sum())


@pytest.mark.parametrize("loss", ["argmax", 3, torch.ones(())])
def test_a_loss_that_cannot_be_called_is_found_before_anything_runs(loss: Any) -> None:
    def never() -> Any:
        raise AssertionError("the data was read")
        yield

    text = "^loss must be a function" if loss == 3 else None
    with refused(CalibrationError, text, got=loss, expected="a function of outputs and labels"):
        fxquant.compile(seeded(testing.Block()), never(), policies.ptq4vit(), loss=loss)


@pytest.mark.parametrize("policy", [policies.ptq4vit(4, 4), policies.mptq_vit(4, 4)])
def test_compile_tells_of_it_too(vit: nn.Module, policy: fxquant.Policy) -> None:
    with pytest.raises(
        CalibrationError, match="labels None, since the batch had no numbers as labels"
    ):
        fxquant.compile(vit, [images(4, 16)], policy, loss=needs_labels)


def test_a_usable_loss_still_counts() -> None:
    found = sampled(seeded(testing.Block()), tokens(4), loss=lambda y, _: y.square().sum())
    assert all(sample.gradient is not None for sample in found.values())
