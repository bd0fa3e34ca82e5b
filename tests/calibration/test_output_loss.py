"""The losses whose gradients weigh the rows of products."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant import testing
from fxquant.config.scale_search import GradientLoss, ScaleSearch
from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.testing import DIM, images, seeded, tokens
from tests.helpers.refusals import refused
from tests.helpers.sampling import ALL, sampled


@pytest.mark.parametrize("loss", list(GradientLoss))
def test_the_gradient_is_really_there(vit: nn.Module, loss: GradientLoss) -> None:
    found = sampled(vit, images(6, 16), search=ScaleSearch(loss=loss))
    assert len(found) == 10  # patches, q, k, v, q k, softmax v, proj, fc1, fc2, head
    for sample in found.values():
        assert sample.gradient is not None and float(sample.gradient.abs().max()) > 1e-4


def kl_to_itself(logits: Tensor, _: Tensor | None) -> Tensor:
    """The loss of the paper's official code, at the float model."""
    shares = logits.detach().softmax(1)
    return F.kl_div(logits.log_softmax(1), shares, reduction="sum")


def test_the_official_codes_loss_has_a_gradient_of_round_off_alone(vit: nn.Module) -> None:
    trap, real = (sampled(vit, images(6, 16), loss=loss) for loss in (kl_to_itself, None))
    for name, sample in trap.items():
        size = 0.0 if sample.gradient is None else float(sample.gradient.abs().max())
        assert size < 1e-4 * float(real[name].gradient.abs().max())


def test_sampled_labels_give_the_gradient_of_their_own_loss() -> None:
    model = seeded(nn.Linear(DIM, 4))
    search = replace(ALL, loss=GradientLoss.SAMPLED)
    found = sampled(model, torch.randn(400, DIM), search=search)
    (sample,) = found.values()
    logits = sample.lhs[0, 0] @ model.weight.T + model.bias
    labels = logits.softmax(1) - sample.gradient[0, 0]
    torch.testing.assert_close(labels, labels.round().abs(), atol=1e-5, rtol=0)
    torch.testing.assert_close(labels.sum(1), torch.ones(400))
    torch.testing.assert_close(labels.mean(0), logits.softmax(1).mean(0), atol=0.05, rtol=0)


def test_outputs_that_are_no_logits_get_the_gaussian_loss() -> None:
    model = seeded(nn.Linear(DIM, 4))
    (sample,) = sampled(model, torch.randn(100, 5, DIM)).values()
    # The gradient is the noise itself.
    assert sample.gradient.std() == pytest.approx(1, abs=0.1)
    assert sample.gradient.mean() == pytest.approx(0, abs=0.1)


class Outputs(nn.Module):
    """A body and two heads, given out in a container."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two, self.give = nn.Linear(DIM, 4), nn.Linear(DIM, 3), give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.one(x).mean(1), self.two(x))


@pytest.mark.parametrize(
    "give",
    [
        lambda a, b: (a, b),
        lambda a, b: {"logits": a, "map": [b, a.argmax(1)]},
        lambda a, b: [(a.detach(),), a, b],
    ],
)
def test_every_output_counts(give: Callable[[Tensor, Tensor], Any]) -> None:
    found = sampled(seeded(Outputs(give)), tokens(4))
    assert all(sample.gradient is not None for sample in found.values()) and len(found) == 2


def test_what_the_loss_does_not_reach_has_no_gradient() -> None:
    model = seeded(Outputs(lambda a, b: (a, b)))
    found = sampled(model, tokens(4), loss=lambda outputs, _: outputs[0].square().sum())
    assert found["one"].gradient is not None and found["two"].gradient is None


def test_outputs_without_a_gradient_raise_and_say_what_to_do() -> None:
    model = seeded(Outputs(lambda a, b: a.argmax(1) + b.argmax(2).sum(1)))
    with pytest.raises(CalibrationError, match="no output of the model has a gradient"):
        sampled(model, tokens(4))


# A loss of the user's


def test_a_loss_of_the_users_sees_outputs_and_labels() -> None:
    model, x, labels = seeded(nn.Linear(DIM, 4)), torch.randn(6, DIM), torch.arange(6) % 4

    def loss(logits: Tensor, given: Tensor | None) -> Tensor:
        assert given is not None and len(given) == len(logits)
        return F.cross_entropy(logits, given, reduction="sum", label_smoothing=0.1)

    (sample,) = sampled(model, x, x, labels=labels, loss=loss).values()
    logits = model(x)
    (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
    rows = torch.cdist(sample.lhs[0, 0], x).argmin(1)
    torch.testing.assert_close(sample.gradient[0, 0], gradient[rows])


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda y, _: y, None),
        (lambda y, _: float(y.detach().sum()), None),
        (lambda y, _: y.detach().sum(), None),
        (lambda y, _: None, "one real number with a gradient, .*; got None"),
    ],
)
def test_a_loss_that_is_not_one_number_raises(loss: Any, text: str | None) -> None:
    values = []

    def recorded(y: Tensor, labels: Tensor | None) -> Any:
        values.append(loss(y, labels))
        return values[-1]

    with refused(CalibrationError, text, expected="one real number with a gradient") as caught:
        sampled(seeded(nn.Linear(DIM, 4)), tokens(4)[:, 0], loss=recorded)
    assert caught.value.got is values[-1]


def test_a_loss_that_is_infinite_raises() -> None:
    text = "loss of a batch is -inf"
    with refused(CalibrationError, text, got=-math.inf, expected="a finite number"):
        sampled(
            seeded(nn.Linear(DIM, 4)),
            tokens(4)[:, 0],
            loss=lambda y, _: (y * 0).square().sum().log(),
        )


# Models


class InPlace(nn.Module):
    """Changes its input, an output of a product and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.relu_()
        y = self.one(x).sigmoid_()
        y.add_(x)
        y[:, 0] = 0
        return self.two(y)


def test_a_model_that_works_in_place_gets_the_gradient_of_one_that_does_not() -> None:
    class Plain(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            x = x.relu()
            y = self.one(x).sigmoid() + x
            return self.two(torch.cat([torch.zeros_like(y[:, :1]), y[:, 1:]], 1))

    x = torch.randn(6, DIM)
    before = x.clone()
    one, two = (sampled(seeded(model), x) for model in (InPlace(), Plain()))
    assert torch.equal(x, before)
    for name in ("one", "two"):
        torch.testing.assert_close(one[name].lhs, two[name].lhs)
        torch.testing.assert_close(one[name].gradient, two[name].gradient)


def test_the_model_and_the_images_stay_as_they_are(vit: nn.Module) -> None:
    model, x = copy.deepcopy(vit), images(5, 16)
    before = copy.deepcopy(model.state_dict())
    sampled(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert x.grad is None and not x.requires_grad


def test_gradients_are_there_where_the_caller_switched_them_off() -> None:
    model = seeded(testing.Block())
    with torch.no_grad():
        found = sampled(model, tokens(4))
    assert all(sample.gradient is not None for sample in found.values())


def test_a_bad_activation_names_its_edge() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(DIM, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.log())

    with refused(NonFiniteError, edge="fc__input") as error:
        sampled(seeded(Log()), -tokens(4)[:, 0].abs())
    assert "While executing" not in str(error.value)
