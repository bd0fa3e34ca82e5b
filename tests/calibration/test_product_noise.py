"""The noise of products: a sum over products, each on float values, at most one each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant import Rule
from fxquant.calibration.product_noise import product_noise
from fxquant.testing import seeded, tokens
from tests.helpers.stages import EIGHT, FOUR, frozen


class Chain(nn.Module):
    """Two linears around a GELU."""

    def __init__(self) -> None:
        super().__init__()
        width = tokens().shape[-1]
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.nn.functional.gelu(self.first(x)))
        return y


def noise(*rules: Rule, model: nn.Module | None = None) -> float:
    return product_noise(frozen(*rules, model=model, seed=model is None), tokens())


def test_the_noise_of_one_product_is_its_relative_squared_error() -> None:
    model = nn.Linear(tokens().shape[-1], 5, bias=False)
    gm = frozen(Rule(spec=FOUR), model=seeded(model), seed=False)
    with torch.no_grad():
        exact = model(tokens())
        error = gm(tokens()) - exact
    expected = float(error.square().sum() / exact.square().sum())
    assert product_noise(gm, tokens()) == pytest.approx(expected, rel=1e-4)


def test_products_read_float_values() -> None:
    model = seeded(Chain())
    alone = [noise(Rule(path=name, spec=FOUR), model=model) for name in ("first", "second")]
    assert min(alone) > 0
    assert noise(Rule(spec=FOUR), model=model) == pytest.approx(sum(alone), rel=1e-4)


def test_fewer_bits_have_more_noise() -> None:
    assert 0 < 20 * noise(Rule(spec=EIGHT)) < noise(Rule(spec=FOUR))


def test_a_ruined_product_counts_as_one() -> None:
    model = seeded(Chain())
    gm = frozen(Rule(path="second", arg="input", spec=EIGHT), model=model, seed=False)
    (quantizer,) = [m for name, m in gm.named_modules() if name.startswith("quant.")]
    quantizer.zero_point.add_(10_000)
    assert product_noise(gm, tokens()) == 1.0


def test_neither_graph_nor_images_are_changed() -> None:
    gm, x = frozen(Rule(spec=FOUR)), tokens()
    code, before, y = gm.code, x.clone(), gm(x)
    product_noise(gm, x)
    assert gm.code == code and torch.equal(x, before) and torch.equal(gm(x), y)
