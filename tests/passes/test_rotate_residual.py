"""RotateResidual: streams turn, the function stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant.config.vocabulary import Stage
from fxquant.errors import PassError
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.graph.macs import MacCounter
from fxquant.graph.nodes import get_parameter, operand
from fxquant.passes import PassResult, RotateHeads, RotateResidual, run_passes
from fxquant.policies.policy import Rule
from fxquant.rotation.flow import NORMS
from fxquant.testing import (
    DIM,
    assert_same_function,
    images,
    op_names,
    product_names,
    relative_error,
    seeded,
    tokens,
)
from tests.helpers.refusals import refused
from tests.helpers.residual import points, residual
from tests.helpers.stages import EIGHT, annotated, canonical, reasons
from tests.helpers.zoo import FAMILIES, Family

ANY_COST = 100.0


def rotated(
    model: nn.Module, x: Tensor, *, seed: int = 0, max_overhead: float = 0.03
) -> tuple[fx.GraphModule, PassResult]:
    """A canonical graph after the pass, what every such pass owes checked."""
    before = copy.deepcopy(model.state_dict())
    gm = canonical(model, x, seed=False)
    item = RotateResidual(seed=seed, max_overhead=max_overhead)
    result = run_passes(gm, [item])["RotateResidual"]
    assert_same_function(gm, model, x)
    values, operations = gm.state_dict(), op_names(gm)
    assert run_passes(gm, [item])["RotateResidual"].changed == 0
    assert op_names(gm) == operations
    assert all(torch.equal(value, gm.state_dict()[name]) for name, value in values.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return gm, result


# Streams of real networks: rotated within 3 % of multiplications, and at any cost.
STREAMS = {
    "vit_tiny_patch16_224": (1, 1),
    "deit3_small_patch16_224": (1, 1),
    "swin_tiny_patch4_window7_224": (2, 2),
    "swinv2_tiny_window8_256": (0, 2),  # each norm's output is added to the stream
    "beit_base_patch16_224": (1, 1),
    "eva02_tiny_patch14_224": (1, 1),
    "cait_xxs24_224": (1, 1),
    "pvt_v2_b0": (5, 7),
    "levit_128s": (0, 0),  # batch norm: no norm reads a stream
    "maxvit_rmlp_pico_rw_256": (1, 2),
    "mobilevit_xxs": (0, 1),
    "convnext_atto": (1, 4),
    "vit_small_patch14_dinov2": (1, 1),
    "torchvision vit": (1, 1),
    "torchvision swin": (2, 2),
    "torchvision swin_v2": (0, 2),
    "torchvision maxvit": (2, 2),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_function_of_real_networks_stays(family: Family) -> None:
    model, x = family.model(), torch.randn(1, *family.image)
    gm = canonical(model, torch.randn(2, *family.image), seed=False)
    for changed, overhead in zip(STREAMS[family.name], (0.03, ANY_COST), strict=True):
        turned = copy.deepcopy(gm)
        item = RotateResidual(max_overhead=overhead)
        assert run_passes(turned, [item])["RotateResidual"].changed == changed
        with torch.no_grad():
            assert relative_error(turned(x), model(x)) < 1e-5


@pytest.mark.parametrize(
    ("name", "size", "options", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", 64, {"depth": 1}, 2),
        ("vit_small_patch14_reg4_dinov2", 56, {"depth": 1}, 2),
        ("vit_small_patch16_dinov3", 64, {"depth": 1}, 1),  # rotary embedding
        (
            "swin_tiny_patch4_window7_224",  # windows are padded: norms keep a bias
            80,
            {"embed_dim": 48, "depths": (2, 2), "num_heads": (3, 6)},
            8,
        ),
    ],
)
def test_the_function_of_variants_stays(
    name: str, size: int, options: dict[str, Any], heads: int
) -> None:
    family = Family(
        name, partial(timm.create_model, name, img_size=size, **options), (3, size, size)
    )
    model, x = family.model(), torch.randn(1, 3, size, size)
    gm = canonical(model, torch.randn(2, 3, size, size), seed=False)
    results = run_passes(gm, [RotateResidual(), RotateHeads()])
    assert results["RotateResidual"].changed == (2 if "swin" in name else 1)
    assert results["RotateHeads"].changed == heads
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-5


@settings(max_examples=15)
@given(
    head_width=st.integers(1, 8),
    heads=st.integers(1, 4),
    seed=st.integers(0, 99),
    rms=st.booleans(),
    scaled=st.booleans(),
    classes=st.integers(0, 3),
)
def test_the_function_stays(
    head_width: int, heads: int, seed: int, rms: bool, scaled: bool, classes: int
) -> None:
    width = max(2, head_width * heads // heads * heads)
    heads = heads if width % heads == 0 else 1
    norm = nn.RMSNorm if rms else nn.LayerNorm
    model = residual(width, heads, norm=norm, scaled=scaled, classes=classes, depth=1)
    _, result = rotated(model, points(), seed=seed, max_overhead=ANY_COST)
    assert result.changed == 1


def test_nothing_is_added_at_run_time() -> None:
    model = residual()
    gm, _ = rotated(model, points())
    before = canonical(model, points(), seed=False)
    assert op_names(gm) == op_names(before) and product_names(gm) == product_names(before)
    assert MacCounter(gm).total == MacCounter(before).total


def test_norms_keep_parameters_that_change_nothing() -> None:
    gm, _ = rotated(residual(), points())
    norms = [node for node in gm.graph.nodes if node.target in NORMS]
    assert len(norms) == 5
    for norm in norms:
        weight, bias = (get_parameter(gm, operand(norm, index)) for index in (2, 3))
        assert bool((weight == 1).all()) and bool((bias == 0).all())


def test_norms_without_parameters_stay_so() -> None:
    def plain(width: int) -> nn.Module:
        return nn.LayerNorm(width, elementwise_affine=False)

    gm, result = rotated(residual(norm=plain), points())
    assert result.changed == 1
    norms = [node for node in gm.graph.nodes if node.target in NORMS]
    assert all(norm.args[2:4].count(None) == len(norm.args[2:4]) for norm in norms)


def test_seeds_draw_other_rotations() -> None:
    one, two = (rotated(residual(), points(), seed=seed)[0] for seed in (0, 1))
    same = rotated(residual(), points(), seed=1)[0]
    weights = [
        get_parameter(gm, next(operand(n, 1) for n in gm.graph.nodes if n.name == "embed"))
        for gm in (one, two, same)
    ]
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])


class _Inputs(GraphInterpreter):
    """Runs a graph and keeps the largest value over the deviation at the input of linears."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.peaks: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.target is torch.ops.aten.linear.default:
            x = self.env[operand(n, 0)]
            self.peaks[n.name] = float(x.abs().max() / x.std())
        return super().run_node(n)


def test_outlying_channels_disappear() -> None:
    model = residual(64, 4)
    with torch.no_grad():
        model.position[..., 7] += 50 * model.position.std()
        for norm in model.norms:
            norm.weight.fill_(1.0)
    peaks = []
    for gm in (canonical(model, points(), seed=False), rotated(model, points())[0]):
        inputs = _Inputs(gm)
        with torch.no_grad():
            inputs.run(points(32))
        peaks.append(inputs.peaks)
    readers = [name for name in peaks[0] if name.endswith(("_q", "_k", "_v")) or "fc1" in name]
    assert len(readers) == 8
    assert all(peaks[1][name] < 0.75 * peaks[0][name] for name in readers)


class Readers(nn.Module):
    """A stream with one branch, and other readers of it.

    Args:
        reader: computes the output from the module, the stream and the normed stream.
        norm: the norm of the branch.
    """

    def __init__(self, reader: Callable[..., object], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.reader = reader
        self.norm = norm or nn.LayerNorm(DIM)
        self.one, self.two = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.conv = nn.Conv1d(DIM, 4, 3, padding=1)
        self.depthwise = nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM)
        self.up = nn.ConvTranspose1d(DIM, 4, 2, stride=2)

    def forward(self, x: Tensor) -> object:
        x = self.one(x)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.reader(self, x, self.norm(x))


READERS: dict[str, Callable[[Readers, Tensor, Tensor], object]] = {
    "linear of the stream": lambda m, x, y: m.two(x),
    "mean": lambda m, x, y: m.two(y.mean(1)),
    "two tokens on the channels": lambda m, x, y: (
        torch.cat([y[:, 0], y.mean(1)], -1) @ torch.ones(2 * DIM, 3)
    ),
    "convolution with padding": lambda m, x, y: m.conv(y.transpose(1, 2)),
    "convolution of the stream": lambda m, x, y: m.conv(x.transpose(1, 2)),
    "transposed convolution": lambda m, x, y: m.up(x.transpose(1, 2)),
    "transposed convolution of a norm": lambda m, x, y: m.up(y.transpose(1, 2)),
    "zeros are padded": lambda m, x, y: m.two(F.pad(y, (0, 0, 1, 2))),
    "weighted tokens": lambda m, x, y: m.two(y * y.detach().new_full((1, 5, 1), 0.5)),
    "masked tokens": lambda m, x, y: m.two(
        y.masked_fill(torch.tensor([True, False, True, False, False]).view(5, 1), 0.0)
    ),
    "negative": lambda m, x, y: m.two(-2.0 * y),
    "dict of outputs": lambda m, x, y: {"features": x, "normed": y, "first": m.two(y[:, 0])},
    "depthwise": lambda m, x, y: m.two(x + m.depthwise(x.transpose(1, 2)).transpose(1, 2)),
    "activation": lambda m, x, y: m.two(x + F.relu(x)),
    "sum with a norm": lambda m, x, y: m.two(m.norm(x + y)),
    "chunks": lambda m, x, y: m.two(torch.chunk(y, 2, 1)[1]),
    "parts of the channels": lambda m, x, y: (y[..., :3], m.two(y)),
    "stack": lambda m, x, y: m.two(torch.stack([x, x * 2.0], 1)),
    "subtraction": lambda m, x, y: m.two(m.norm(x - m.two(x))),
    "alpha": lambda m, x, y: m.two(torch.add(x, x, alpha=2)),
    "a number is added": lambda m, x, y: m.two(m.norm(x + 1.0)),
    "one value for all channels": lambda m, x, y: m.two(m.norm(x + x[..., :1].detach())),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_any_reader_gets_the_values_it_had(
    norm: type[nn.Module], reader: Callable[..., object]
) -> None:
    model = seeded(Readers(reader, norm(DIM)))
    _, result = rotated(model, tokens(), max_overhead=ANY_COST)
    assert result.changed >= 1


def test_a_small_weight_keeps_its_norm_as_an_entry() -> None:
    model = seeded(Readers(READERS["zeros are padded"]))
    with torch.no_grad():
        model.norm.weight[2] = 1e-9
    gm, _ = rotated(model, tokens(), max_overhead=ANY_COST)
    assert any(name.endswith("_rotated") for name in product_names(gm))


def test_shared_weights_turn_once_for_each_reader() -> None:
    model = seeded(Readers(lambda m, x, y: F.linear(y, m.one.weight) + m.fc1(y).sum()))
    _, result = rotated(model, tokens(), max_overhead=ANY_COST)
    assert result.changed == 1


def test_scales_of_layers_are_folded() -> None:
    gm, result = rotated(residual(scaled=True), points())
    plain = canonical(residual(scaled=True), points(), seed=False)
    assert result.changed == 1
    assert op_names(plain).count("mul") - op_names(gm).count("mul") == 4


# Refusals


class Depthwise(nn.Module):
    """A network whose blocks read the stream channel by channel, as ConvNeXt's do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, 2, stride=2)
        self.depthwise = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        self.norm, self.fc = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.fc(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        z: Tensor = self.fc(self.norm((x + y).mean((2, 3))))
        return z


def test_a_stream_that_costs_too_much_is_refused() -> None:
    model = seeded(Depthwise())
    _, result = rotated(model, images())
    assert result.changed == 0
    (reason,) = reasons(result).values()
    assert reasons(result).keys() == {"stem"}
    assert reason == (
        "the residual stream stays: linears behind stem would have to rotate at run time, with "
        "27.1% of the network's multiplications; 3.0% are allowed for all streams"
    )


def test_a_network_without_streams_is_refused() -> None:
    _, result = rotated(seeded(nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())), tokens())
    assert "nothing is rotated" in reasons(result)["model"]


def test_the_wrong_stage_raises() -> None:
    gm, _ = annotated(Rule(spec=EIGHT))
    with refused(PassError, got=Stage.ANNOTATED, expected=Stage.FLOAT):
        run_passes(gm, [RotateResidual()])
