"""Capture: any image model becomes a graph of its own, and a refusal says where and why."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from fxquant import testing
from fxquant.config.vocabulary import Stage
from fxquant.errors import (
    BatchError,
    CaptureError,
    ControlFlowError,
    NonFiniteError,
    NothingToQuantizeError,
    TrainingModeError,
)
from fxquant.graph.capture import capture
from fxquant.graph.dialect import op_kind
from fxquant.graph.nodes import module_path, source_line
from fxquant.passes import NameNodes, run_passes
from fxquant.testing import DIM, assert_same_function, seeded, tokens
from tests.helpers.refusals import refused


class Wrapped(nn.Module):
    """Puts a failing or odd function of the tokens below a named module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(DIM, DIM), _Call(function))

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class _Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def branch_on_values(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


MODELS = {
    "packed": testing.PackedAttention,
    "per head": testing.PerHeadAttention,
    "kv": testing.KvAttention,
    "torch": testing.TorchAttention,
    "causal": lambda: testing.FusedAttention(is_causal=True),
    "einsum": testing.Einsum,
    "products": testing.Products,
    "linear norm": testing.LinearNorm,
    "block": testing.Block,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_computes_what_the_model_does_at_any_batch_size(name: str) -> None:
    model = seeded(MODELS[name]())
    gm = capture(model, tokens(2))
    assert gm.meta["stage"] is Stage.FLOAT
    for batch in (1, 5):
        assert_same_function(gm, model, tokens(batch), 1e-6)


def test_the_users_model_is_not_touched() -> None:
    model = seeded(testing.Block())
    model.fc1.weight.requires_grad_(False)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.fc1.register_forward_pre_hook(lambda *_: calls.append("pre"))
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]

    gm = capture(model, tokens())
    with torch.no_grad():
        gm(tokens())
        for parameter in (*gm.parameters(), *gm.buffers()):
            parameter.zero_()

    assert calls == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training
    model(tokens())
    assert calls == ["pre", "forward"]


@pytest.mark.parametrize(
    "outputs",
    [
        lambda x: (x, x + 1),
        lambda x: [x, x * 2],
        lambda x: {"logits": x, "features": (x + 1, [x])},
        lambda x: (x,),
    ],
)
def test_outputs_keep_their_structure(outputs: Any) -> None:
    model = seeded(Wrapped(outputs))
    gm = capture(model, tokens())
    result, expected = gm(tokens()), model(tokens())
    assert type(result) is type(expected)
    if isinstance(expected, dict):
        assert result.keys() == expected.keys()
        assert isinstance(result["features"], tuple) and isinstance(result["features"][1], list)
    assert_same_function(gm, model, tokens())


def test_nodes_know_module_and_source_line() -> None:
    gm = capture(seeded(testing.Block()), tokens())
    by_path = {module_path(n): n for n in gm.graph.nodes if op_kind(n) is not None}
    assert {"attn.qkv", "attn.proj", "fc1", "fc2"} <= by_path.keys()
    assert "testing.py" in source_line(by_path["attn.qkv"])


def test_no_module_is_refused() -> None:
    text = r"must be a torch\.nn\.Module, got function"
    with refused(CaptureError, text, got=branch_on_values, expected=nn.Module):
        capture(branch_on_values, tokens())  # type: ignore[arg-type]


def test_training_mode_is_refused_and_named() -> None:
    model = seeded(testing.Block())
    model.attn.proj.train()
    with refused(TrainingModeError, r"attn\.proj.*model\.eval\(\)", edge="attn.proj"):
        capture(model, tokens())
    with refused(TrainingModeError, "in training mode: the model itself, norm1, norm2 …;", edge=""):
        capture(model.train(), tokens())


def test_a_branch_on_values_is_refused_with_module_and_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    line = branch_on_values.__code__.co_firstlineno + 1
    with refused(ControlFlowError, edge="inner.1") as caught:
        capture(seeded(Wrapped(branch_on_values)), tokens())
    message = str(caught.value)
    assert "module inner.1 " in message
    assert f"test_capture.py:{line}:" in message
    assert "torch.where" in message
    assert capfd.readouterr() == ("", "")  # torch prints and logs the graph


def test_a_branch_on_shapes_is_no_problem() -> None:
    model = seeded(Wrapped(lambda x: x + 1 if x.shape[-1] == DIM else x))
    assert_same_function(capture(model, tokens()), model, tokens())


def test_a_fixed_batch_size_is_refused_with_advice() -> None:
    model = seeded(Wrapped(lambda x: x.reshape(3, -1)[: x.shape[0]].reshape(3, -1)))
    with refused(CaptureError, r"fixes its batch size.*x\.shape\[0\]", edge=""):
        capture(model, tokens(3))


def test_images_that_do_not_fit_are_refused_with_the_shape() -> None:
    with refused(BatchError, got=(2, 5, 7), expected=None):
        capture(seeded(testing.Block()), torch.randn(2, 5, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_than_float32_are_refused_with_advice(dtype: torch.dtype) -> None:
    text = rf"weight norm1\.weight is {dtype}.*model\.float\(\)"
    with refused(CaptureError, text, edge="norm1.weight", got=dtype, expected=torch.float32):
        capture(seeded(testing.Block()).to(dtype), tokens().to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named(bad: float) -> None:
    model = seeded(testing.Block())
    model.fc1.weight.data[0, 0] = bad
    with refused(NonFiniteError, "weight fc1.weight holds NaN or infinity", edge="fc1.weight"):
        capture(model, tokens())


def test_a_damaged_buffer_is_named() -> None:
    model = seeded(testing.ConvNorm())
    model.bn.running_mean[0] = float("nan")
    with refused(NonFiniteError, edge="bn.running_mean"):
        capture(model, testing.images())


def test_a_computed_tensor_kept_as_an_attribute_is_copied() -> None:
    model = seeded(nn.Sequential(nn.Linear(DIM, DIM)))
    model.cache = model[0].weight * 2  # no leaf, which deepcopy alone refuses
    assert_same_function(capture(model, tokens()), model, tokens())


def test_a_model_that_cannot_be_copied_is_refused_with_advice() -> None:
    model = seeded(nn.Sequential(nn.Linear(DIM, DIM)))
    model.lock = threading.Lock()
    with pytest.raises(CaptureError, match=r"cannot be deep-copied.*state dict"):
        capture(model, tokens())


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))
    model[2].weight = model[0].weight
    assert_same_function(capture(seeded(model), tokens()), model, tokens())


def test_a_symbolically_traced_model() -> None:
    model = seeded(nn.Sequential(nn.Linear(DIM, DIM), nn.GELU()))
    assert_same_function(capture(fx.symbolic_trace(model).eval(), tokens()), model, tokens())


def test_buffers_that_are_not_saved_are_part_of_the_graph() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)
            self.register_buffer("shift", torch.arange(DIM) * 1.0, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.shift

    model = Shifted().eval()
    assert_same_function(capture(model, tokens()), model, tokens())


@pytest.mark.parametrize("old_api", [True, False])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm(old_api: bool) -> None:
    norm = nn.utils.weight_norm if old_api else parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(DIM, DIM)), nn.GELU()).eval()
    assert_same_function(capture(model, tokens()), model, tokens())


def test_a_model_that_fills_a_cache_keeps_its_own_empty() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.cache = nn.Linear(DIM, DIM), {}

        def forward(self, x: Tensor) -> Tensor:
            if "bias" not in self.cache:
                self.cache["bias"] = self.linear.bias * 2
            return self.linear(x) + self.cache["bias"]

    model = Caching().eval()
    gm = capture(model, tokens())
    assert model.cache == {}
    assert_same_function(gm, model, tokens())


def test_in_place_operations() -> None:
    def in_place(x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] += 1
        return y.relu_()

    model = seeded(Wrapped(in_place))
    assert_same_function(capture(model, tokens()), model, tokens())


def test_nothing_to_quantize() -> None:
    gm = capture(nn.LayerNorm(DIM).eval(), tokens())
    text = "no linear, convolution or matrix product, .* was the right module passed"
    with refused(NothingToQuantizeError, text):
        run_passes(gm, [NameNodes()])
