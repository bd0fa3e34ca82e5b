"""Embeddings and logits, told apart by the operations that compute them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.graph.embeddings import embedding_reason, float_output_nodes
from fxquant.testing import DIM, images, tokens
from tests.helpers.stages import canonical

SMALL = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}


def reason(model: nn.Module, x: Tensor) -> str | None:
    gm = canonical(model.eval(), x)
    (output,) = float_output_nodes(gm)
    return embedding_reason(gm, output)


def vit(name: str = "vit_tiny_patch16_224", **options: object) -> nn.Module:
    model: nn.Module = timm.create_model(name, **{**SMALL, **options})
    return model


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_classes": 0}, "a norm"),  # the class token behind the last norm
        ({"num_classes": 0, "global_pool": "avg", "fc_norm": False}, "a norm"),
        ({"num_classes": 0, "global_pool": "avg", "fc_norm": True}, "a norm"),
        ({"num_classes": 0, "global_pool": "map"}, "a residual addition"),
        ({"num_classes": 0, "global_pool": "avg", "final_norm": False}, "a residual addition"),
    ],
)
def test_a_vit_without_classes_gives_embeddings(options: dict[str, object], word: str) -> None:
    found = reason(vit(**options), images(2, 32))
    assert found is not None and found.endswith(word)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"num_classes": 5}),
        ("vit_tiny_patch16_224", {"num_classes": 5, "global_pool": "avg", "fc_norm": True}),
        ("vit_tiny_patch16_224", {"num_classes": 5, "global_pool": "map"}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 5}),  # the mean of two heads
    ],
)
def test_a_classifier_gives_logits(name: str, options: dict[str, object]) -> None:
    assert reason(vit(name, **options), images(2, 32)) is None


class Tail(nn.Module):
    """A linear with a function behind it."""

    def __init__(self, tail: Callable[[Tensor], Tensor], *, bias: bool) -> None:
        super().__init__()
        self.norm, self.fc, self.tail = nn.LayerNorm(DIM), nn.Linear(DIM, 6, bias=bias), tail
        self.offset = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.fc(self.norm(x)))


@pytest.mark.parametrize(
    ("tail", "word"),
    [
        (lambda y: F.normalize(y[:, 0], dim=-1), "as a norm does"),
        (lambda y: y[:, 0] * y[:, 0].square().sum(-1, keepdim=True).rsqrt(), "as a norm does"),
        (lambda y: F.layer_norm(y.mean(1), (6,)), "a norm"),
        (lambda y: y.relu().mean(1), "an activation function"),
        (lambda y: torch.cat([y[:, 0], y.tanh().mean(1)], 1), "an activation function"),
    ],
)
def test_what_follows_a_linear_makes_embeddings(
    tail: Callable[[Tensor], Tensor], word: str
) -> None:
    found = reason(Tail(tail, bias=True), tokens())
    assert found is not None and found.endswith(word)


@pytest.mark.parametrize(
    "tail",
    [
        lambda y: y[:, 0],
        lambda y: y.mean(1),  # a head on each token
        lambda y: 5 * y[:, 0] / 0.07,
        lambda y: y[:, 0].softmax(-1),
        lambda y: y[:, 0].log_softmax(-1),
        lambda y: y[:, 0].sigmoid(),
        lambda y: y[:, 0].masked_fill(torch.arange(6) > 3, -torch.inf),
        lambda y: y[:, 0] - y[:, 0].mean(1, keepdim=True),
        lambda y: torch.cat([y[:, 0], y[:, 1]], 1),
    ],
)
def test_what_follows_a_linear_leaves_logits(tail: Callable[[Tensor], Tensor]) -> None:
    assert reason(Tail(tail, bias=True), tokens()) is None


def test_a_projection_without_a_bias_gives_embeddings() -> None:
    found = reason(Tail(lambda y: y[:, 0], bias=False), tokens())
    assert found is not None and "a projection without a bias" in found


def test_a_bias_that_is_added_counts() -> None:
    model = Tail(lambda y: y[:, 0] + torch.arange(6.0), bias=False)
    assert reason(model, tokens()) is None


class Cosines(nn.Module):
    """A classifier by cosines with one direction per class."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(DIM), nn.Linear(DIM, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 20 * self.fc(F.normalize(self.norm(x)[:, 0], dim=-1))


def test_cosines_with_classes_are_logits() -> None:
    assert reason(Cosines(), tokens()) is None


def test_an_input_given_out_is_no_logits() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(DIM, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, 0], self.fc(x[:, 0])

    gm = canonical(Same(), tokens())
    first, second = (embedding_reason(gm, node) for node in float_output_nodes(gm))
    assert first is not None and "no product computes" in first
    assert second is None
