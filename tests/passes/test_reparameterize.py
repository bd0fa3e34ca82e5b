"""Reparameterize: every channel behind a norm gets one range."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant import testing
from fxquant.config.spec import TensorSpec
from fxquant.graph.capture import capture
from fxquant.graph.nodes import get_parameter
from fxquant.passes import PassResult, Reparameterize, run_passes
from fxquant.quantizers import UniformQuantizer
from fxquant.smoothing.channel_ranges import norm_ranges
from fxquant.smoothing.fold_sites import Site, norm_sites
from fxquant.testing import (
    DIM,
    TOKENS,
    assert_same_function,
    images,
    op_names,
    relative_error,
    seeded,
    tokens,
)
from tests.helpers.norms import Norm, Read, both, linear_inputs, padded, site_of
from tests.helpers.stages import canonical
from tests.helpers.zoo import FAMILIES, Family


def reparameterize(gm: fx.GraphModule, x: Tensor) -> PassResult:
    return run_passes(gm, [Reparameterize(norm_ranges(gm, [x]))])["Reparameterize"]


def reparameterized(
    model: nn.Module, x: Tensor, changed: int, tol: float = 1e-5
) -> tuple[fx.GraphModule, PassResult]:
    """A canonical graph after the pass, what every such pass owes checked."""
    before = copy.deepcopy(model.state_dict())
    gm = canonical(model, x, seed=False)
    operations = op_names(gm)
    result = reparameterize(gm, x)
    assert result.changed == changed
    assert op_names(gm) == operations
    assert_same_function(gm, model, x, tol)
    again = reparameterize(gm, x)
    assert again.changed == 0 and again.notes == result.notes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return gm, result


# The pass


def test_all_channels_get_one_range() -> None:
    gm, result = reparameterized(seeded(Norm(both)), tokens(), changed=1)
    assert result.notes == ()
    ((lo, hi),) = norm_ranges(gm, [tokens()]).values()
    torch.testing.assert_close(lo, lo[:1].expand(DIM), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hi, hi[:1].expand(DIM), rtol=1e-4, atol=1e-5)
    assert float(lo[0]) <= 1e-5 and float(hi[0]) >= -1e-5


def test_ranges_become_the_mean_of_scales_and_zero_points() -> None:
    gm = canonical(Norm(both, nn.LayerNorm(DIM)), tokens())
    ((lo, hi),) = norm_ranges(gm, [tokens()]).values()
    scale = (hi - lo) / 15
    zero, width = (-lo / scale).mean().clamp(0, 15), scale.mean()
    reparameterize(gm, tokens())
    ((lo, hi),) = norm_ranges(gm, [tokens()]).values()
    torch.testing.assert_close(lo, (-zero * width).expand(DIM), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hi, ((15 - zero) * width).expand(DIM), rtol=1e-4, atol=1e-5)


def test_parameters_that_others_read_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(self.norm(x)).sin() * self.norm.weight)

    gm, result = reparameterized(seeded(Tied()), tokens(), changed=1)
    assert result.notes == ()
    one, two = (n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert one.args[1] is not two.args[1]


@pytest.mark.parametrize(
    ("read", "norm"), [(padded, nn.LayerNorm(DIM)), (both, nn.RMSNorm(DIM))], ids=["pad", "rms"]
)
def test_where_nothing_can_shift_the_largest_magnitudes_become_equal(
    read: Read, norm: nn.Module
) -> None:
    gm, _ = reparameterized(seeded(Norm(read, norm)), tokens(), changed=1)
    assert not site_of(gm).shiftable
    ((lo, hi),) = norm_ranges(gm, [tokens()]).values()
    peak = torch.maximum(-lo, hi)
    torch.testing.assert_close(peak, peak[:1].expand(DIM), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("gamma", [0.0, 1e-30, 1e-5])
@pytest.mark.parametrize("read", [both, padded])
def test_a_dead_channel_harms_nothing(gamma: float, read: Read) -> None:
    model = seeded(Norm(read))
    with torch.no_grad():
        model.norm.weight[3], model.norm.bias[3] = gamma, 40.0
    gm, _ = reparameterized(model, tokens(), changed=1)
    if read is both:  # its constant is in the bias
        assert float(linear_inputs(gm, tokens())[0][..., 3].abs().max()) < 1e-3


def test_a_constant_norm_stays() -> None:
    model = seeded(Norm(both))
    nn.init.zeros_(model.norm.weight)
    reparameterized(model, tokens(), changed=0)


def test_a_norm_that_others_read_stays_and_says_so() -> None:
    _, result = reparameterized(seeded(Norm(lambda m, y: m.one(y) + y.sum())), tokens(), 0)
    assert [skip.reason for skip in result.notes] == [
        "the norm stays: sum_1 (sum) reads it too, and is not a linear"
    ]


def test_a_norm_without_ranges_stays_and_says_so() -> None:
    gm = canonical(Norm(both), tokens())
    result = run_passes(gm, [Reparameterize({})])["Reparameterize"]
    assert result.changed == 0
    assert [skip.reason for skip in result.notes] == [
        "the norm stays: its ranges were not measured"
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_outlier_channels_cost_less_after_the_fold(bits: int) -> None:
    """What the pass is for: one scale for the tensor, channels of unlike widths."""
    model = seeded(Norm(lambda m, y: m.one(y)))
    with torch.no_grad():
        model.norm.weight.fill_(1.0)[2] = 30.0
        model.one.weight[:, 2] /= 30.0
    x = torch.randn(16, TOKENS, DIM)
    gm = capture(model, x)
    errors = []
    for _ in range(2):
        (read,) = linear_inputs(gm, x)
        quantizer = UniformQuantizer.from_range(read.min(), read.max(), TensorSpec(bits=bits), None)
        linear = site_of(gm).linears[0]
        weight, bias = (get_parameter(gm, node) for node in linear.args[1:])
        rounded = F.linear(quantizer(read), weight, bias)
        errors.append(float((rounded - F.linear(read, weight, bias)).detach().square().mean()))
        reparameterize(gm, x)
    assert errors[1] < 0.1 * errors[0]


# Whole models


def test_every_norm_of_a_vit_is_folded(vit: nn.Module) -> None:
    model = copy.deepcopy(vit)
    # At its initial value the class token drowns what differs between images.
    nn.init.normal_(model.cls_token)
    _, result = reparameterized(model, images(2, 16), changed=3)
    assert result.notes == ()


def test_swin_with_shifted_windows(swin: nn.Module) -> None:
    gm, result = reparameterized(swin, images(2, 32), changed=4)
    assert result.notes == ()  # the norms before the blocks and the head feed no linear
    assert "roll" in op_names(gm)
    assert all(site.shiftable for _, site in norm_sites(gm) if isinstance(site, Site))


def test_swin_whose_windows_are_padded_is_scaled_there() -> None:
    options = {"img_size": 24, "window_size": 4, "depths": (2,), "num_heads": (2,)}
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=16, num_classes=5, **options
    ).eval()
    gm, _ = reparameterized(model, images(2, 24), changed=4)
    sites = [site for _, site in norm_sites(gm) if isinstance(site, Site)]
    assert [site.shiftable for site in sites] == [False, True, False, True]


def test_the_block_stays_close_to_its_function_far_from_zero() -> None:
    model = seeded(testing.Block())
    with torch.no_grad():
        model.norm1.bias.mul_(1e3)
        model.norm2.weight[0] *= 1e3
    gm, _ = reparameterized(model, tokens(), changed=2)
    assert relative_error(gm(tokens()), model(tokens())) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_keep_their_function(family: Family) -> None:
    model = family.model()
    x = images(2, family.image[-1])
    gm = canonical(model, x, seed=False)
    sites = [norm for norm, site in norm_sites(gm) if isinstance(site, Site)]
    assert reparameterize(gm, x).changed == len(sites)
    assert_same_function(gm, model, x, 1e-5)
