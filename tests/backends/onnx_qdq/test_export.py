"""The ONNX QDQ backend: types, fusion, agreement with the simulation, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import fxquant
from fxquant import CompiledModel, Policy, Rule, TensorSpec, policies, testing
from fxquant.backends.onnx_qdq import TARGETS, OnnxExport, make_session
from fxquant.backends.onnx_qdq.difference import TOLERANCE, relative_difference
from fxquant.backends.onnx_qdq.target import u8s8_saturates
from fxquant.errors import LoweringError, OutputError
from fxquant.testing import DIM, PackedAttention, seeded, tokens
from tests.helpers.agreement import assert_same_codes
from tests.helpers.refusals import refused


class Block(nn.Module):
    """A patch embedding, attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, stride=4)
        self.norm = nn.LayerNorm(DIM)
        self.attention = PackedAttention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, 16, 16)`` to ``(B, C)``."""
        y = self.embed(x).flatten(2).transpose(1, 2)
        y = y + self.attention(self.norm(y))
        return (y + self.mlp(y)).mean(1)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(policy: Policy, model: nn.Module | None = None) -> CompiledModel:
    """Compiled, a Block once for each policy where no model is named; not to be changed."""
    return _block(policy) if model is None else _compile(policy, model)


@cache
def _block(policy: Policy) -> CompiledModel:
    return _compile(policy, Block())


def _compile(policy: Policy, model: nn.Module) -> CompiledModel:
    return fxquant.compile(seeded(model), [images()], policy)


def run(path: Path, batch: Tensor) -> Tensor:
    session = make_session(path)
    return torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> OnnxExport:
    """The file of a Block at eight bits; not to be changed."""
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    return build(policies.w8a8()).export_onnx(path)


def test_every_product_runs_on_an_integer_kernel(exported: OnnxExport) -> None:
    # embed, q, k, v, proj, fc1, fc2 and the two attention products
    assert exported.unfused == () and sum(exported.fused.values()) == 9
    assert exported.fused["QGemm"] == 7
    assert exported.file_bytes == exported.path.stat().st_size
    assert "QGemm" in str(exported)


def test_the_file_has_the_promised_format(exported: OnnxExport) -> None:
    model = onnx.load(str(exported.path))
    assert model.ir_version == 10
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [21]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    text = str(model.metadata_props) + "".join(str(n.metadata_props) for n in model.graph.node)
    assert "/" not in text and "stack" not in text


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_size_equals_the_simulation(exported: OnnxExport, batch: int) -> None:
    model = build(policies.w8a8())
    torch.testing.assert_close(
        run(exported.path, images(batch)), model(images(batch)), rtol=1e-2, atol=1e-2
    )
    assert_same_codes(model, exported.path, images(batch))


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_storage_types_follow_the_target(tmp_path: Path, target: str) -> None:
    exported = build(policies.w8a8()).export_onnx(tmp_path / "m.onnx", target=target)
    model = onnx.load(str(exported.path))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    right = TensorProto.INT8 if target == "x86-vnni" else TensorProto.UINT8
    products = [n for n in model.graph.node if n.op_type in ("Gemm", "MatMul")]
    assert len(products) == 9
    for node in products:
        kinds = [types[makers[name].input[2]] for name in node.input[:2]]
        assert kinds == [TensorProto.UINT8, right], node.name
        if len(node.input) > 2:
            assert types[makers[node.input[2]].input[0]] == TensorProto.INT32


def test_auto_is_the_target_that_is_exact_here(tmp_path: Path) -> None:
    model = build(policies.w8a8())
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.target == ("x86-avx2" if u8s8_saturates() else "x86-vnni")
    assert exported.difference is not None and exported.difference.relative_l2 < 0.05


def _spec(**options: object) -> TensorSpec:
    return TensorSpec(**options)  # type: ignore[arg-type]


WEIGHTS = Rule(arg="weight", spec=_spec(symmetric=True, granularity="channel"))


@pytest.mark.parametrize(
    "policy",
    [
        policies.minmax(4, 4),
        policies.minmax(2, 3),
        policies.minmax(8, 5),
        policies.minmax(7, 7),
        Policy(
            name="heads",
            rules=(
                WEIGHTS,
                Rule(op="matmul", spec=_spec(symmetric=True, granularity="head")),
                Rule(spec=_spec()),
            ),
        ),
        Policy(
            name="asymmetric weights",
            rules=(
                Rule(arg="weight", spec=_spec(granularity="channel")),
                Rule(spec=_spec(symmetric=True)),
            ),
        ),
        Policy(name="per tensor", rules=(Rule(spec=_spec(symmetric=True, bits=6)),)),
    ],
    ids=lambda policy: policy.name,
)
def test_every_form_of_uniform_quantizer_is_exact(tmp_path: Path, policy: Policy) -> None:
    model = build(policy)
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.unfused == ()
    ours, theirs = model(images()), run(exported.path, images())
    assert torch.linalg.vector_norm(ours - theirs) < 0.05 * torch.linalg.vector_norm(ours)
    assert_same_codes(model, exported.path, images())


def test_asymmetric_scales_per_head_are_exact_but_float(tmp_path: Path) -> None:
    rules = (WEIGHTS, Rule(op="matmul", spec=_spec(granularity="head")), Rule(spec=_spec()))
    model = build(Policy(name="heads", rules=rules))
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.unfused and all(item.reason for item in exported.unfused)
    torch.testing.assert_close(run(exported.path, images()), model(images()), rtol=0.05, atol=0.05)


def test_sixteen_bits_are_exact_and_say_why_they_are_float(tmp_path: Path) -> None:
    model = build(policies.minmax(16, 16))
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert {item.reason for item in exported.unfused} == {"16-bit codes have no integer kernel"}
    torch.testing.assert_close(run(exported.path, images()), model(images()), rtol=1e-4, atol=1e-4)


def test_float_edges_stay_float_and_say_so(tmp_path: Path) -> None:
    rules = (Rule(path="mlp.*", arg="input", spec=None), *policies.w8a8().rules)
    model = build(Policy(name="weights alone in the mlp", rules=rules))
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.fused["MatMulNBits"] == 2 and exported.fused["QGemm"] == 5
    torch.testing.assert_close(run(exported.path, images()), model(images()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("activation", "fused"),
    [(nn.ReLU(), {"QLinearConv": 1, "QGemm": 1}), (nn.GELU(), {"QGemm": 1})],
)
def test_a_padded_grouped_convolution_is_exact(
    tmp_path: Path, activation: nn.Module, fused: dict[str, int]
) -> None:
    conv = nn.Conv2d(3, 6, 3, padding=1, stride=2, groups=3)
    model = build(policies.w8a8(), nn.Sequential(conv, activation, nn.Flatten(), nn.Linear(384, 4)))
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.fused == fused
    assert all("quantized output" in item.reason for item in exported.unfused)
    assert len(exported.unfused) == 2 - len(fused)
    assert_same_codes(model, exported.path, images())


def test_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = build(policies.w8a8())
    before, state = model.graph_module.code, copy.deepcopy(model.state_dict())
    model.export_onnx(tmp_path / "m.onnx")
    assert model.graph_module.code == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_loaded_model_exports_the_same_file(tmp_path: Path) -> None:
    model = build(policies.w8a8())
    model.save(tmp_path / "saved")
    first = model.export_onnx(tmp_path / "a.onnx").path.read_bytes()
    second = fxquant.load(tmp_path / "saved").export_onnx(tmp_path / "b.onnx").path
    assert np.array_equal(run(second, images()).numpy(), run(tmp_path / "a.onnx", images()).numpy())
    assert len(first) == second.stat().st_size


def test_a_scale_per_channel_of_an_activation_is_refused(tmp_path: Path) -> None:
    rules = (WEIGHTS, Rule(arg="input", op="linear", spec=_spec(granularity="channel")))
    model = build(Policy(name="channels", rules=rules))
    text = "supports one scale for the input .*; use granularity tensor"
    with refused(LoweringError, text, edge="attention_qkv__input", got=8, expected=1):
        model.export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with refused(LoweringError, "did you mean 'x86-vnni'", got="x86-vni") as caught:
        build(policies.w8a8()).export_onnx(tmp_path / "m.onnx", target="x86-vni")
    assert {"auto", "x86-vnni"} <= set(caught.value.expected)


def test_an_unwritable_path_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "m.onnx"
    with refused(OutputError, got=path):
        build(policies.w8a8()).export_onnx(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_tokens_without_an_image_axis_export_too(tmp_path: Path) -> None:
    model = fxquant.compile(seeded(PackedAttention()), [tokens()], "w8a8")
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert sum(exported.fused.values()) == 6
    assert_same_codes(model, exported.path, tokens())


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda y: y, ["output"]),
        (lambda y: (y, [None, y + 1]), ["output_0", "output_1_1"]),
        (lambda y: {"logits": y, "images": y * 2}, ["logits", "images_"]),
        (lambda y: {"both": (y, y)}, ["both_0", "both_1"]),
    ],
)
def test_outputs_are_named_as_the_model_names_them(
    wrap: Callable[[Tensor], Any], names: list[str], tmp_path: Path
) -> None:
    class Wrapped(testing.Block):
        def forward(self, x: Tensor) -> Any:
            return wrap(super().forward(x))

    exported = fxquant.compile(seeded(Wrapped()), [tokens()], "w8a8").export_onnx(tmp_path / "m")
    found = make_session(exported.path).get_outputs()
    assert [value.name for value in found] == names


def test_a_none_beside_the_logits_is_left_out(tmp_path: Path) -> None:
    class WithNone(testing.Block):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return super().forward(x), None

    model = fxquant.compile(seeded(WithNone()), [tokens()], "w8a8")
    exported = model.export_onnx(tmp_path / "m.onnx")
    (found,) = make_session(exported.path).run(None, {"images": tokens().numpy()})
    ours, nothing = model(tokens())
    assert nothing is None
    assert relative_difference(found, ours.numpy()) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mlp_2__input_scale", lambda value: value * np.float32(1.01)),
        ("mlp_2__input_zero_point", lambda value: value + np.uint8(1)),
        ("mlp_0_bias_codes", lambda value: value + np.int32(2000)),
    ],
)
def test_the_comparison_of_codes_sees_one_wrong_number(
    tmp_path: Path, name: str, change: Any
) -> None:
    model = build(policies.w8a8())
    path = model.export_onnx(tmp_path / "m.onnx").path
    file = onnx.load(str(path))
    (tensor,) = (tensor for tensor in file.graph.initializer if tensor.name == name)
    wrong = np.asarray(change(onnx.numpy_helper.to_array(tensor)))
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, name))
    onnx.save(file, str(path))
    # The last quantizer stands behind all others: no tie before it may excuse it.
    with pytest.raises(AssertionError, match="mlp_2__input"):
        assert_same_codes(model, path, images())
