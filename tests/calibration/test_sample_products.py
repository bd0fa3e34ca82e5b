"""Rows of products and their gradients, drawn from the float model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.calibration.row_samplers import LinearRowSampler
from fxquant.config.scale_search import GradientLoss, Metric, ScaleSearch
from fxquant.errors import CalibrationError
from fxquant.search.product_loss import ProductSample
from fxquant.testing import DIM, HEADS, images, seeded, tokens
from tests.helpers.refusals import refused
from tests.helpers.sampling import ALL, argmax_loss, sampled


def by_rows(x: Tensor) -> Tensor:
    """``(S, H, n, N)`` as rows ``(S n, H N)``."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def assert_rows(found: ProductSample, out: Tensor, gradient: Tensor | None, count: int) -> None:
    """Checks that a sample is ``count`` different rows of a product with their gradients.

    Args:
        found: the sample.
        out: the whole product without a bias, as rows ``(M, N)``.
        gradient: of it; None if the sample must have none.
        count: expected.
    """
    rows = by_rows(found.lhs @ found.rhs)
    distance, index = torch.cdist(rows, out, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert float(distance.max()) < 1e-4
    assert len(rows) == count == len(index.unique())
    if gradient is None:
        assert found.gradient is None
        return
    assert found.gradient is not None and bool(gradient.any())
    counts = torch.ones(count) if found.counts is None else found.counts
    expected = gradient[index] * counts.sqrt().unsqueeze(1)
    torch.testing.assert_close(by_rows(found.gradient), expected, rtol=1e-4, atol=1e-6)


class Classifier(nn.Module):
    """One layer, GELU, and the mean over all axes but the classes."""

    def __init__(self, layer: nn.Module, classes: int) -> None:
        super().__init__()
        self.layer, self.classes = layer, classes

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.layer(x))
        axes = [axis for axis in range(1, y.ndim) if axis != self.classes % y.ndim]
        return y.mean(axes) if axes else y


def products_of(model: Classifier, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the layer without its bias and the gradient of it, the classes last."""
    out = model.layer(x)
    out.retain_grad()
    model.layer.register_forward_hook(lambda *_: out)
    argmax_loss(model(x)).backward()
    assert out.grad is not None
    last = model.classes % out.ndim
    y, gradient = (t.detach().movedim(last, -1).flatten(0, -2) for t in (out, out.grad))
    return y - bias, gradient


# What a row is


@pytest.mark.parametrize("rows", [10_000, 7])
@pytest.mark.parametrize("shape", [(6, DIM), (6, 5, DIM), (6, 2, 5, DIM)])
def test_rows_of_a_linear(shape: tuple[int, ...], rows: int) -> None:
    model, x = seeded(Classifier(nn.Linear(DIM, 4), -1)), torch.randn(shape)
    found = sampled(model, x, search=replace(ALL, rows=rows))["layer"]
    y, gradient = products_of(model, x, model.layer.bias.detach())
    assert_rows(found, y, gradient, min(rows, len(y)))


CONVOLUTIONS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.Conv2d, {"kernel_size": (3, 2), "padding": (2, 1), "stride": (1, 2)}),
    (nn.Conv2d, {"kernel_size": (2, 3), "padding": (1, 0), "groups": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 2, "dilation": (2, 1), "groups": 4}),
    (nn.Conv2d, {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": 4, "padding": "valid", "stride": 4}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 1, "stride": 2}),
    (nn.Conv1d, {"kernel_size": 2, "padding": "same", "dilation": 3, "groups": 2}),
    (nn.Conv3d, {"kernel_size": (1, 2, 3), "padding": (0, 1, 2), "stride": (1, 1, 2)}),
]


@pytest.mark.parametrize("rows", [10_000, 7])
@pytest.mark.parametrize(("kind", "options"), CONVOLUTIONS)
def test_rows_of_a_convolution(kind: type[nn.Module], options: dict[str, Any], rows: int) -> None:
    model = seeded(Classifier(kind(4, 8, **options), 1))
    x = torch.randn(3, 4, *{nn.Conv1d: (9,), nn.Conv2d: (9, 7), nn.Conv3d: (2, 5, 4)}[kind])
    found = sampled(model, x, search=replace(ALL, rows=rows))["layer"]
    y, gradient = products_of(model, x, model.layer.bias.detach())
    assert_rows(found, y, gradient, min(rows, len(y)))


class Attended(nn.Module):
    """A product of two activations, summed to logits; also given out for the reference."""

    def __init__(self, operands: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.operands = operands

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.operands(x)
        y = F.gelu(left @ right)
        return y.flatten(1).unflatten(1, (-1, 3)).sum(1)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


PRODUCTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "heads": lambda x: (heads(x), heads(x.sin())[:, :, :3].mT),
    "three axes": lambda x: (x, x.sin()[:, :3].mT),
    "one right operand for all": lambda x: (heads(x), heads(x.sin())[:1, :, :3].mT),
    "one right operand for all heads": lambda x: (heads(x), x.sin()[:, None, :3, :4].mT),
    "windows": lambda x: (heads(x)[:, None], heads(x.sin())[:, None, :, :3].mT),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_of_a_product_of_activations(name: str) -> None:
    model, x = Attended(PRODUCTS[name]).eval(), torch.randn(4, 6, DIM)
    (found,) = sampled(model, x).values()
    left, right = PRODUCTS[name](x)
    out = (left @ right).requires_grad_()
    logits = F.gelu(out).flatten(1).unflatten(1, (-1, 3)).sum(1)
    (gradient,) = torch.autograd.grad(argmax_loss(logits), out)
    shape = (-1, out.shape[-3] if out.ndim > 3 else 1, *out.shape[-2:])
    assert_rows(found, by_rows(out.detach().reshape(shape)), by_rows(gradient.reshape(shape)), 24)


def test_few_rows_of_a_product_of_activations_come_from_few_samples() -> None:
    model, x = Attended(PRODUCTS["heads"]).eval(), torch.randn(9, 6, DIM)
    (found,) = sampled(model, x, search=replace(ALL, rows=13)).values()
    assert found.lhs.shape == (2, HEADS, 6, DIM // HEADS)
    (found,) = sampled(model, x, search=replace(ALL, rows=4)).values()
    assert found.lhs.shape == (1, HEADS, 4, DIM // HEADS)
    out = by_rows(heads(x) @ heads(x.sin())[:, :, :3].mT)
    assert_rows(replace(found, gradient=None), out, None, 4)


def test_axes_that_change_with_the_batch_are_no_heads() -> None:
    def swapped(x: Tensor) -> tuple[Tensor, Tensor]:
        return heads(x).transpose(0, 1), heads(x).transpose(0, 1)[:, :, :3].mT

    (found,) = sampled(Attended(swapped).eval(), tokens(3), tokens(5)).values()
    assert found.heads == 1 and found.lhs.shape[0] == 8 * HEADS


def test_a_matrix_whose_size_changes_with_the_batch_is_not_sampled() -> None:
    class Kernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0] @ x[:, 0].T

    assert sampled(Kernel().eval(), tokens(3), tokens(5)) == {}


# Which rows


def test_every_row_is_as_likely_as_any_other() -> None:
    """300 draws of 8 out of 40 rows that come in unequal batches: 60 each on average."""
    counts = torch.zeros(40)
    for seed in range(300):
        rows = LinearRowSampler(
            torch.ones(1, 1), 1, torch.Generator().manual_seed(seed), Metric.MSE
        )
        rows.set_limit(8)
        for part in torch.arange(40.0).unsqueeze(1).split([1, 25, 3, 11]):
            rows.observe(part, torch.ones(1, 1), part)
            rows.commit()
        kept = rows.sample().lhs.flatten()
        assert len(kept.unique()) == 8
        counts[kept.long()] += 1
    # Standard deviation 6.9.
    assert counts.min() > 30 and counts.max() < 90


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_rows_of_large_gradient_are_likelier_and_stand_for_fewer(skew: float) -> None:
    """Sums over the sample are unbiased, and those of gradients hardly vary."""
    values, gradients = torch.rand(2, 200, 1).unbind()
    gradients *= (torch.randn(200, 1) * skew).exp()
    exact = float(gradients.square().sum()), float(values.mean())
    energies, means = [], []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        rows = LinearRowSampler(torch.ones(1, 1), 1, generator, Metric.HESSIAN)
        rows.set_limit(30)
        for x, g in zip(values.split(50), gradients.split(50), strict=True):
            out = x.clone().requires_grad_().clone()
            rows.observe(x, torch.ones(1, 1), out)
            (out * g).sum().backward()
            rows.commit()
        found = rows.sample()
        assert found.gradient is not None and found.counts is not None
        energies.append(float(found.gradient.square().sum()))
        means.append(float(found.lhs[0, 0, :, 0] @ found.counts / found.counts.sum()))
    one, other = torch.tensor(energies) / exact[0], torch.tensor(means)
    assert float(one.mean()) == pytest.approx(1, abs=0.03) and float(one.std()) < 0.2
    assert float(other.mean()) == pytest.approx(exact[1], abs=0.02) and float(other.std()) < 0.12


def equal(one: dict[str, ProductSample], two: dict[str, ProductSample]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(a.lhs, b.lhs)
        and torch.equal(a.rhs, b.rhs)
        and (a.gradient is b.gradient is None or torch.equal(a.gradient, b.gradient))
        for a, b in zip(one.values(), two.values(), strict=True)
    )


@pytest.mark.parametrize("loss", list(GradientLoss))
def test_the_seed_decides(vit: nn.Module, loss: GradientLoss) -> None:
    batches = images(7, 16), images(2, 16)
    search = ScaleSearch(rows=6, loss=loss)
    one = sampled(vit, *batches, search=search)
    assert equal(one, sampled(vit, *batches, search=search))
    assert not equal(one, sampled(vit, *batches, search=replace(search, seed=1)))


# Memory


def stored(found: dict[str, ProductSample]) -> int:
    """Bytes behind the samples, those of the model's own weights left out."""
    tensors = [t for s in found.values() for t in (s.lhs, s.gradient) if t is not None]
    tensors += [s.rhs for name, s in found.items() if "matmul" in name]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("metric", [Metric.HESSIAN, Metric.MSE])
@pytest.mark.parametrize("budget", [60_000, 100_000, 250_000])
def test_the_budget_is_kept_and_used(swin: nn.Module, budget: int, metric: Metric) -> None:
    search = ScaleSearch(memory_bytes=budget, metric=metric)
    found = sampled(swin, images(9, 32), images(4, 32), search=search)
    assert budget / 2 < stored(found) <= budget


def test_too_small_a_budget_raises_and_tells_the_least(swin: nn.Module) -> None:
    def run(budget: int) -> dict[str, ProductSample]:
        return sampled(swin, images(4, 32), search=ScaleSearch(memory_bytes=budget))

    text = r"memory_bytes is 1,000, and 16 rows of each product need [\d,]+: raise it in the policy"
    with refused(CalibrationError, text, got=1000) as caught:
        run(1000)
    (least,) = map(int, re.findall(r"^>= (\d+)$", str(caught.value.expected)))
    assert f"need {least:,}:" in str(caught.value)
    assert run(least)
    with refused(CalibrationError, got=least - 1, expected=f">= {least}"):
        run(least - 1)


def test_attention_rows_that_the_loss_reaches_come_first(vit: nn.Module) -> None:
    """Behind a class token only its own row has a gradient."""
    found = sampled(vit, images(6, 16), search=replace(ALL, rows=2))
    attention = [sample for sample in found.values() if not sample.channels]
    assert len(attention) == 2
    for sample in attention:
        assert sample.gradient is not None and sample.lhs.shape[2] == 2
        assert bool(sample.gradient.flatten(1).any(1).all())
