"""Streams: where channels flow, how they are laid out, where they end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.rotation.flow import Flow, bias_before_weight
from fxquant.rotation.layout import Layout, read_layout
from fxquant.rotation.plan import plan_rotation
from fxquant.rotation.trace import trace_flow
from fxquant.testing import DIM, seeded, tokens
from tests.helpers.residual import points, residual
from tests.helpers.stages import canonical


@given(
    width=st.integers(2, 9), copies=st.integers(1, 3), axis=st.integers(0, 2), zeros=st.booleans()
)
def test_a_layout_is_read_from_its_numbers(width: int, copies: int, axis: int, zeros: bool) -> None:
    shape = [4, 4, 4]
    shape[axis] = width * copies
    layout = Layout(width, axis, copies)
    numbers = layout.numbers(shape).clone()
    if zeros:
        numbers.narrow((axis + 1) % 3, 0, 1).zero_()
    assert read_layout(numbers, width) == (layout, zeros)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda numbers: numbers.flip(-1),
        lambda numbers: numbers[..., :5],
        lambda numbers: numbers + 1,
        lambda numbers: numbers.reshape(2, 3, 2, 3),
        lambda numbers: numbers.mean(-1),
    ],
)
def test_channels_out_of_order_have_no_layout(spoil: object) -> None:
    numbers = Layout(6, 2).numbers([2, 3, 6])
    assert read_layout(spoil(numbers), 6) is None  # type: ignore[operator]


def test_interpolated_numbers_are_read() -> None:
    numbers = Layout(6, 1).numbers([2, 6, 3, 3])
    larger = F.interpolate(numbers, size=(7, 5), mode="bilinear")
    assert read_layout(larger, 6) == (Layout(6, 1), False)


def test_a_bias_goes_before_the_weight() -> None:
    weight, bias = torch.tensor([2.0, -0.5, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    before = bias_before_weight(weight, bias)
    assert before is not None and before.tolist() == [0.5, -2.0, 0.0]
    assert bias_before_weight(weight, bias + 1) is None


def names_of(flow: Flow, number: int) -> dict[str, list[str]]:
    """Names of the nodes that a stream touches."""
    return {
        "producers": [n.name for n, s in flow.producers.items() if flow.stream(s) == number],
        "consumers": [n.name for n, c in flow.consumers if flow.stream(c.stream) == number],
        "constants": [n.name for n, c in flow.constants.items() if flow.stream(c.stream) == number],
        "exits": [n.name for n, (c, _) in flow.exits.items() if flow.stream(c.stream) == number],
        "entries": [n.name for n, c, _ in flow.entries if flow.stream(c.stream) == number],
    }


def test_a_transformer_has_one_stream() -> None:
    gm = canonical(residual(depth=1, scaled=True), points(), seed=False)
    flow = trace_flow(gm)
    (stream,) = plan_rotation(gm, flow, 0.0).rotated
    assert stream.width == 16 and stream.keeps_mean
    assert names_of(flow, stream.number) == {
        "producers": ["embed", "attention_0_proj", "fc2_0"],
        "consumers": ["attention_0_q", "attention_0_k", "attention_0_v", "fc1_0", "head"],
        "constants": ["token", "position"],
        "exits": [],
        "entries": [],
    }
    assert [scale.product.name for scale in flow.scales] == ["attention_0_proj", "fc2_0"]
    assert len(flow.norms) == 3 and all(r.entry is None for r in flow.norms.values())


def test_rms_norms_need_no_mean() -> None:
    gm = canonical(residual(depth=1, norm=nn.RMSNorm), points(), seed=False)
    (stream,) = plan_rotation(gm, trace_flow(gm), 0.0).rotated
    assert not stream.keeps_mean


class Merging(nn.Module):
    """Two stages: pairs of tokens are merged on the channels, normed and reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.norms = nn.ModuleList(nn.LayerNorm(n * DIM) for n in (1, 2, 1))
        self.reduction, self.head = nn.Linear(2 * DIM, DIM), nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.fc(self.norms[0](x))
        x = torch.cat([x[:, :-1:2], x[:, 1::2]], -1)
        y: Tensor = self.head(self.norms[2](self.reduction(self.norms[1](x))))
        return y


def test_merged_tokens_are_copies_of_the_channels() -> None:
    gm = canonical(seeded(Merging()), tokens(), seed=False)
    flow = trace_flow(gm)
    layouts = {node.name: carrier.layout for node, carrier in flow.consumers}
    assert layouts["reduction"] == Layout(DIM, 2, copies=2)
    assert [stream.width for stream in plan_rotation(gm, flow, 0.0).rotated] == [DIM, DIM]


class Foreign(nn.Module):
    """A stream to which an activation is added, and from which an activation reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x) + F.relu(x)
        z: Tensor = self.two(self.norm(y)) + F.gelu(y)
        return z


def test_values_enter_and_leave_a_stream() -> None:
    gm = canonical(seeded(Foreign()), tokens(), seed=False)
    flow = trace_flow(gm)
    (stream,) = plan_rotation(gm, flow, 100.0).rotated
    names = names_of(flow, stream.number)
    assert names["entries"] == ["relu"] and names["exits"] == ["add"]
    plan = plan_rotation(gm, flow, 0.5)
    assert plan.rotated == () and "linears behind add, relu" in plan.refused["one"]


def test_channels_that_linears_read_on_another_axis_leave_the_stream() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Linear(DIM, DIM), nn.LayerNorm(DIM)
            self.mix, self.head = nn.Linear(5, 5), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
            y: Tensor = self.head(self.norm(x))
            return y

    gm = canonical(seeded(Mixer()), tokens(), seed=False)
    flow = trace_flow(gm)
    assert "transpose" in [node.name for node in flow.exits]
