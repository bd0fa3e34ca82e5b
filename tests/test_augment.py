"""Training on images made of those given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.blocks import whole_network
from fxquant.errors import PolicyError
from fxquant.graph import get_parameter
from fxquant.passes import Reconstruct, run_passes
from fxquant.quantizers import UniformQuantizer
from fxquant.reconstruction import training
from fxquant.reconstruction.augment import augmented, fresh
from fxquant.recovery import Reconstruction
from fxquant.side_by_side import SideBySide
from fxquant.testing import seeded
from tests.test_reconstruct import BATCH, SHORT, Tower, frozen, reconstruct

NETWORK = {"scope": "network", "block_loss": "mse"}


@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(4, 9), st.integers(4, 9), st.integers(0, 99)
)
def test_images_are_new_and_of_the_same_kind(b: int, c: int, h: int, w: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(b, c, h, w)
    made = augmented(x)
    assert made.shape == x.shape
    assert made.dtype is x.dtype
    assert made.isfinite().all()
    assert not any(torch.equal(one, two) for one, two in zip(made, x, strict=True))
    torch.manual_seed(seed)
    torch.randn(b, c, h, w)
    assert torch.equal(augmented(x), made)


@given(st.integers(2, 9), st.integers(0, 99))
def test_what_is_no_image_is_mixed_alone(count: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.eye(count).unsqueeze(1)  # (B, 1, B): of which images one is made
    made = augmented(x).squeeze(1)
    assert torch.allclose(made.sum(1), torch.ones(count))
    assert (made.diagonal() >= 0.7).all()
    assert ((made > 0).sum(1) <= 2).all()


def test_the_float_network_says_what_new_images_should_give() -> None:
    gm = frozen()
    model = seeded(Tower())
    station = next(iter(SideBySide(gm, BATCH).walk(gm, (whole_network(gm),), "walk", 1 << 20)))
    torch.manual_seed(0)
    made = fresh(station, torch.tensor([3, 1]), 11)
    everything = slice(0, 11)
    ((_, x),) = made.given.get(everything, station.device).items()
    ((_, y),) = made.target.get(everything, station.device).items()
    assert made.count == len(x) == 11
    assert torch.allclose(model(x), y, atol=1e-5)


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_new_images_bring_the_outputs_nearer(held_out: float) -> None:
    gm = frozen()
    with torch.no_grad():
        exact = seeded(Tower())(BATCH)
        before = (gm(BATCH) - exact).square().mean()
        result = reconstruct(gm, **NETWORK, augment=True, held_out=held_out)
        assert (gm(BATCH) - exact).square().mean() < before
    (gain,) = result.gains
    assert gain.ratio < 1


def test_images_are_made_anew_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    def kept(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.numpy().tobytes())
        return augmented(x)

    monkeypatch.setattr(training, "augmented", kept)
    reconstruct(frozen(), **NETWORK, augment=True, iterations=5)
    assert len(seen) == len(set(seen)) == 5


def test_progress_has_the_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxquant.progress.QUIET_SECONDS", -1.0)
    monkeypatch.setattr("fxquant.progress.LINE_SECONDS", -1.0)
    gm = frozen()
    options = Reconstruction(**{**SHORT, **NETWORK, "augment": True, "held_out": 0.0})
    run_passes(gm, [Reconstruct(SideBySide(gm, BATCH, progress=True), options)])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reconstruct 1/1, loss x 1.000: 0/25, ")
    found = {float(line.split("loss x ")[1].split(":")[0]) for line in lines}
    assert len(found) > 2
    assert min(found) < 1


def test_blocks_cannot_be_trained_on_new_images() -> None:
    with pytest.raises(PolicyError, match="set scope to 'network', or augment to False"):
        Reconstruction(augment=True)


def test_scales_of_weights_alone_keep_the_codes() -> None:
    gm = frozen()
    before = codes(gm)
    assert reconstruct(gm, **NETWORK, weights="scales", biases=False).changed == 1
    after = codes(gm)
    assert before.keys() == after.keys()
    for name, (old, scale) in before.items():
        new, trained = after[name]
        assert torch.equal(old, new)
        assert not torch.equal(scale, trained)
    with pytest.raises(PolicyError, match="set scales to True, or weights to 'none'"):
        Reconstruction(weights="scales", scales=False)


def codes(gm: torch.fx.GraphModule) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and scale of each weight, by name of its quantizer."""
    found = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.all_input_nodes[0].op == "get_attr":
            quantizer = gm.get_submodule(str(node.target))
            assert isinstance(quantizer, UniformQuantizer)
            weight = get_parameter(gm, node.all_input_nodes[0])
            found[node.name] = quantizer.quantize(weight), quantizer.scale.clone()
    return found


def test_work_bounds_the_steps() -> None:
    def took(work: float | None) -> int:
        gm, steps = frozen(), []
        options = Reconstruction(**{**SHORT, **NETWORK, "iterations": 25, "work": work})

        class Counted(training._Run):
            def take(self, images: torch.Tensor) -> None:
                steps.append(images)
                super().take(images)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "_Run", Counted)
            result = run_passes(gm, [Reconstruct(SideBySide(gm, BATCH), options)])["Reconstruct"]
        if not steps:
            (skip,) = result.skips
            assert "raise work or set it to None" in skip.reason
        return len(steps)

    assert took(None) == 25
    some = next(work for work in (2.0**i for i in range(40)) if took(work))
    assert 20 <= took(some) <= 25
    assert took(some / 2) == 0
