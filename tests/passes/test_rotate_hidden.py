"""RotateHidden: inputs of linears behind activation functions turn, the function stays."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant.errors import PolicyError
from fxquant.graph.macs import MacCounter
from fxquant.graph.meta import QUANT_SPECS
from fxquant.passes import (
    AssignSpecs,
    PassResult,
    RotateHeads,
    RotateHidden,
    RotateResidual,
    run_passes,
)
from fxquant.policies.policy import Rule
from fxquant.testing import assert_same_function, seeded
from tests.helpers.refusals import refused
from tests.helpers.stages import EIGHT, canonical, reasons
from tests.helpers.zoo import FAMILIES, Family, run_on_family


class Mlp(nn.Module):
    """Two linears around an activation function or a gate."""

    def __init__(self, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.fc1, self.gate = nn.Linear(6, hidden), nn.Linear(6, hidden)
        self.fc2, self.activation = nn.Linear(hidden, 5), activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        if self.activation == "gated":
            y = F.silu(self.gate(x)) * y
        elif self.activation != "none":
            y = getattr(F, self.activation)(y)
        result: Tensor = self.fc2(y)
        return result


def tokens() -> Tensor:
    return torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))


def rotated(
    model: nn.Module, changed: int, **options: float
) -> tuple[fx.GraphModule, PassResult, fx.GraphModule]:
    """The graph after the pass, its result, and the graph before."""
    weights = copy.deepcopy(model.state_dict())
    before = canonical(model, tokens(), seed=False)
    gm = copy.deepcopy(before)
    rotation = RotateHidden(**{"max_overhead": 9.0, **options})  # type: ignore[arg-type]
    result = run_passes(gm, [rotation])["RotateHidden"]
    assert result.changed == changed
    assert_same_function(gm, model, tokens())
    assert run_passes(gm, [rotation])["RotateHidden"].changed == 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    return gm, result, before


def rotation_of(gm: fx.GraphModule) -> Tensor:
    (matrix,) = (value for name, value in gm.named_buffers() if "rotation" in name)
    return matrix


@settings(max_examples=20)
@given(
    blocks=st.integers(1, 5),
    size=st.sampled_from([8, 16, 64]),
    activation=st.sampled_from(["gelu", "relu", "silu", "gated"]),
    seed=st.integers(0, 99),
)
def test_the_function_stays(blocks: int, size: int, activation: str, seed: int) -> None:
    gm, _, _ = rotated(seeded(Mlp(blocks * size, activation)), 1, seed=seed)
    assert len(rotation_of(gm)) >= size


# Linears behind activation functions in real networks: rotated, and refused.
LINEARS = {
    "vit_tiny_patch16_224": (2, 0),
    "swin_tiny_patch4_window7_224": (4, 0),
    "eva02_tiny_patch14_224": (1, 0),
    "levit_128s": (10, 0),
    "vit_small_patch14_dinov2": (1, 0),
    "torchvision vit": (1, 0),
    "torchvision swin": (4, 0),
}


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in LINEARS], ids=lambda family: family.name
)
def test_the_function_of_real_networks_stays(family: Family) -> None:
    result = run_on_family(family, RotateHidden(max_overhead=9.0))
    assert (result.changed, len(result.notes)) == LINEARS[family.name]


def test_an_outlying_channel_is_spread() -> None:
    model = seeded(Mlp(64))
    with torch.no_grad():
        model.fc1.weight[3] *= 100
    gm, _, before = rotated(model, 1)
    ratios = []
    for graph in (before, gm):
        with torch.no_grad():
            values = _input_of(graph, "fc2")
        ratios.append(float(values.abs().max() / values.std()))
    assert ratios[1] < 0.5 * ratios[0]


def _input_of(gm: fx.GraphModule, name: str) -> Tensor:
    """What the node of that name reads."""
    graph = copy.deepcopy(gm)
    (node,) = (n for n in graph.graph.nodes if n.name == name)
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    output.args = (node.args[0],)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    values: Tensor = graph(tokens())
    return values


def test_blocks_stay_within_the_overhead() -> None:
    model = seeded(Mlp(64))
    _, _, before = rotated(model, 1)
    for overhead in (5.0, 2.0, 1.0):
        gm, _, _ = rotated(model, 1, max_overhead=overhead)
        added = MacCounter(gm).total - MacCounter(before).total
        assert 0 < added <= overhead * MacCounter(before).total
    sizes = [len(rotation_of(rotated(model, 1, max_overhead=o)[0])) for o in (5.0, 2.0, 1.0)]
    assert sizes == [32, 16, 8]


def test_the_largest_block_is_an_option() -> None:
    assert len(rotation_of(rotated(seeded(Mlp(64)), 1, block=16)[0])) == 16


class TwoHeads(Mlp):
    """Two linears that read one activation."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.second = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc1(x))
        return torch.cat([self.fc2(y), self.second(y)], -1)


def test_linears_that_read_one_activation_share_its_rotation() -> None:
    gm, _, before = rotated(seeded(TwoHeads(64)), 2)
    added = MacCounter(gm).total - MacCounter(before).total
    assert len(rotation_of(gm)) == 64
    alone = MacCounter(rotated(seeded(Mlp(64)), 1)[0]).total
    assert added == alone - MacCounter(canonical(seeded(Mlp(64)), tokens())).total > 0


# Refusals


class ComputedWeight(Mlp):
    """The second linear has a weight that the first image gives."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(self.fc1(x)), self.gate(x)[0])


class Pairs(Mlp):
    """The second linear reads a value for each pair of images."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)[None].expand(x.shape[0], -1, -1, -1)))
        return y.transpose(0, 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ComputedWeight, "its weight is computed at run time"),
        (Pairs, "several axes have sizes that depend on the batch"),
    ],
)
def test_a_linear_that_cannot_take_the_rotation_is_refused(model: type[Mlp], reason: str) -> None:
    _, result, _ = rotated(seeded(model(64)), 0)
    assert reason in str(reasons(result))


def test_channels_without_blocks_are_refused() -> None:
    _, result, _ = rotated(seeded(Mlp(12)), 0)
    assert "blocks of 12 channels within max_overhead have 4" in reasons(result)["fc2"]


def test_an_overhead_that_allows_nothing_is_refused() -> None:
    _, result, _ = rotated(seeded(Mlp(64)), 0, max_overhead=0.0)
    assert "within max_overhead have 0" in reasons(result)["fc2"]


def test_a_linear_behind_a_linear_stays() -> None:
    _, result, _ = rotated(seeded(Mlp(64, "none")), 0)
    assert not result.notes


def test_the_rotation_stays_float() -> None:
    gm, _, _ = rotated(seeded(Mlp(64)), 1)
    result = run_passes(gm, [AssignSpecs((Rule(spec=EIGHT),))])["AssignSpecs"]
    names = {node.name for node in gm.graph.nodes if QUANT_SPECS.get(node)}
    assert "fc2" in names and "fc2_rotated" not in names
    assert reasons(result)["fc2_rotated__input"] == (
        "left float: it rotates the input of the next linear"
    )


@pytest.mark.parametrize(
    ("rotation", "option", "value", "expected"),
    [
        (RotateHidden, "block", 24, "a power of two"),
        (RotateHidden, "block", 4, "a whole number >= 8"),
        (RotateHidden, "max_overhead", -0.1, "a number in [0, 100]"),
        (RotateResidual, "max_overhead", float("nan"), "a number in [0, 100]"),
        (RotateResidual, "seed", -1, "a whole number >= 0"),
        (RotateHidden, "seed", 0.5, "a whole number >= 0"),
        (RotateHeads, "seed", True, "a whole number >= 0"),
    ],
)
def test_options_are_checked(rotation: type, option: str, value: object, expected: str) -> None:
    with refused(PolicyError, f"^{option} must be", got=value, expected=expected):
        rotation(**{option: value})
