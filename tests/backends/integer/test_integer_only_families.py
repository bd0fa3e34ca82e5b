"""Which operations and model families run integer-only, and what stands in the way of others."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant import Granularity, Rule, TensorSpec, policies
from fxquant.backends.integer import float_operations
from fxquant.config.vocabulary import OpKind
from tests.helpers.integer_only import Ends, assert_same_codes, compiled, images
from tests.helpers.zoo import FAMILIES, Family

REASONS = {
    "swinv2_tiny_window8_256": "linalg_vector_norm has no integer form",
    "eva02_tiny_patch14_224": "mul has no integer form",  # rotary embedding
    "levit_128s": "batch_norm has no integer form",
    "maxvit_rmlp_pico_rw_256": "avg_pool2d has no integer form",
    "torchvision swin_v2": "linalg_vector_norm has no integer form",
    "torchvision maxvit": "avg_pool2d has no integer form",
}


FUNCTIONS = {
    "a negative factor": lambda x: x * -0.5,
    "a divisor": lambda x: x / 3,
    "a factor of each channel": lambda x: torch.linspace(-1, 1, 16) * x,
    "parts put together again": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "padding of a sum": lambda x: functional.pad((x + x.roll(1, -1))[..., :9], (3, 4)),
    "a mean next to values": lambda x: x + x.relu().mean(-1, keepdim=True),
    "a pool of each channel": lambda x: x + functional.adaptive_avg_pool2d(x.relu(), 1),
    "a pool of each row": lambda x: (
        x + functional.adaptive_avg_pool1d(x.relu().flatten(1, 2), 1).view(-1, 3, 16, 1)
    ),
    "hardswish": functional.hardswish,
    "sigmoid of sigmoid": lambda x: x.sigmoid().sigmoid(),
    "softmax across rows": lambda x: x.softmax(-2),
    "a norm of a norm": lambda x: functional.rms_norm(functional.layer_norm(x, (16,)), (16,)),
    "a sum of softmax and gelu": lambda x: x.softmax(-1) + functional.gelu(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations_between_products_give_the_codes_of_the_simulation(name: str) -> None:
    qm = compiled(policies.w8a8(full=True), Ends(FUNCTIONS[name]))
    lowered = qm.lower("integer", integer_only=True)
    assert_same_codes(qm, lowered, images(3))
    assert float_operations(lowered, images(1)) == []


class TwoViews(nn.Module):
    """One value, its channels sorted into heads in two ways, each multiplied by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x[:, 0]).reshape(-1, 16, 16)
        blocks = x.view(-1, 16, 2, 8).permute(0, 2, 1, 3)
        every_other = x.view(-1, 16, 8, 2).permute(0, 3, 1, 2)
        parts = [part @ part.transpose(-2, -1) for part in (blocks, every_other)]
        return self.two((parts[0] + parts[1]).flatten(1, 2))


def test_channels_sorted_into_heads_in_two_ways_do_not_share_codes() -> None:
    spec = TensorSpec(granularity=Granularity.HEAD)
    policy = policies.w8a8(full=True).with_rules(Rule(op=OpKind.MATMUL, spec=spec))
    qm = compiled(policy, TwoViews())
    quant = qm.graph_module.quant
    for name in ("matmul_1__lhs", "matmul_1__rhs"):  # equal quantizers, of other channels
        source = getattr(quant, name.replace("_1", ""))
        quant.register_module(name, copy.deepcopy(source))
    lowered = qm.lower("integer", integer_only=True)
    assert_same_codes(qm, lowered, images(3))


def test_an_image_that_joins_its_own_features_is_refused() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.cat([x, self.one(x)]).relu() * 2)

    reason = compiled(policies.w8a8(full=True), Joined()).lower("integer").meta["float_because"]
    assert reason == "x is float and joins integer values"


def test_a_pool_to_several_places_is_refused() -> None:
    qm = compiled(policies.w8a8(full=True), Ends(lambda x: functional.adaptive_avg_pool2d(x, 16)))
    reason = qm.lower("integer").meta["float_because"]
    assert "is a mean that is not over whole axes of fixed size" in reason


def test_scales_along_two_axes_are_refused() -> None:
    rows = torch.linspace(0.5, 1, 16)[:, None]
    qm = compiled(policies.w8a8(full=True), Ends(lambda x: x * rows))
    reason = qm.lower("integer").meta["float_because"]
    assert reason.startswith("one has a scale for each channel, and what reads one has one for")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family_runs_integer_only_or_says_why_not(family: Family) -> None:
    x = torch.randn(4, *family.image, generator=torch.Generator().manual_seed(1))
    qm = fxquant.compile(family.model(), [x], policies.w8a8(full=True))
    lowered = qm.lower("integer")
    if family.name in REASONS:
        assert lowered.meta["float_because"].endswith(REASONS[family.name])
        return
    assert lowered.meta["float_because"] == ""
    assert float_operations(lowered, x[:1]) == []
    assert_same_codes(qm, lowered, x[:2])


def test_leaving_the_integers_early_is_seen() -> None:
    class Early(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            codes = (x * 10).round().to(torch.int8)
            return (codes.float() / 10).softmax(-1) @ x.mT

    assert float_operations(Early(), torch.ones(2, 3, 4)) == ["aten.bmm.default"]
