"""DeferSoftmax: the division by row sums moves behind the product, and one grid fits all rows."""

from __future__ import annotations

import copy
from dataclasses import replace

import onnxruntime as ort
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxquant
from fxquant import policies
from fxquant.config.spec import TensorSpec
from fxquant.graph.blocks import find_blocks
from fxquant.graph.edges import edges, fed_by
from fxquant.graph.softmax import is_deferred_softmax, is_softmax
from fxquant.passes import DeferSoftmax, PassResult, run_passes
from fxquant.policies.policy import Rule
from fxquant.quantizers import UniformQuantizer
from fxquant.smoothing.fold_sites import Site, linear_sites
from fxquant.testing import assert_same_function, images, op_names, relative_error, seeded
from tests.helpers.stages import canonical


class Attention(nn.Module):
    """Single-head attention; ``read`` is called with the softmax and the values."""

    def __init__(self, read=lambda p, v: p @ v, axis: int = -1) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.read, self.axis = read, axis
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        probabilities = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(self.axis)
        return self.out(self.read(probabilities, self.v(x)))


def deferred(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, PassResult]:
    gm = canonical(model, x, seed=False)
    result = run_passes(gm, [DeferSoftmax()])["DeferSoftmax"]
    assert_same_function(gm, model, x, 1e-5)
    return gm, result


def x_of(tokens_: int = 5) -> Tensor:
    return torch.randn(2, tokens_, 8, generator=torch.Generator().manual_seed(0))


def test_the_division_moves_behind_the_product() -> None:
    gm, result = deferred(seeded(Attention()), x_of())
    assert result.changed == 1 and not result.notes
    names = op_names(gm)
    assert "softmax" not in " ".join(names)
    order = [n.split(".")[0] for n in names]
    assert order.index("exp") < order.index("div")
    (product,) = (edge for edge in edges(gm) if fed_by(edge) == "softmax")
    assert is_deferred_softmax(product.source)
    assert run_passes(gm, [DeferSoftmax()])["DeferSoftmax"].changed == 0


def test_rows_reach_one() -> None:
    gm, _ = deferred(seeded(Attention()), x_of())
    (node,) = (node for node in gm.graph.nodes if is_deferred_softmax(node))
    seen = []

    class Read(fx.Interpreter):
        def run_node(self, n: fx.Node):  # type: ignore[no-untyped-def]
            value = super().run_node(n)
            if n is node:
                seen.append(value)
            return value

    Read(gm).run(x_of())
    assert torch.equal(seen[0].amax(-1), torch.ones_like(seen[0].amax(-1)))


REFUSED = {
    "another axis": Attention(axis=1),
    "output too": Attention(lambda p, v: (p @ v) + p.sum()),
    "both operands": Attention(lambda p, v: p @ p @ v),
    "part of the rows": Attention(lambda p, v: p[..., :3] @ v[:, :3]),
    "changed rows": Attention(lambda p, v: p.tanh() @ v),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_readers_keep_the_softmax(name: str) -> None:
    gm, result = deferred(seeded(copy.deepcopy(REFUSED[name])), x_of())
    assert result.changed == 0 and len(result.notes) == 1
    assert "its division stays" in result.notes[0].reason
    assert any(is_softmax(node) for node in gm.graph.nodes)


def test_two_products_read_the_same_rows() -> None:
    gm, result = deferred(seeded(Attention(lambda p, v: p @ v + p @ v.tanh())), x_of())
    assert result.changed == 1
    assert sum(node.target is torch.ops.aten.div.Tensor for node in gm.graph.nodes) == 2


def test_a_mask_of_minus_infinity() -> None:
    class Causal(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x)[:, None], self.k(x)[:, None], self.v(x)[:, None]
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y[:, 0])

    _, result = deferred(seeded(Causal()), x_of())
    assert result.changed == 1


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_real_families(name: str) -> None:
    torch.manual_seed(0)
    windows = {"depths": (1, 1), "num_heads": (2, 2)}
    small = windows if "swin" in name else {"depth": 2, "num_heads": 3}
    model = timm.create_model(name, img_size=64, num_classes=4, embed_dim=48, **small).eval()
    gm, result = deferred(model, images(2, 64))
    assert result.changed == 2
    assert len(find_blocks(gm)) == len(find_blocks(canonical(model, images(2, 64), seed=False)))


def test_values_are_still_folded_into_the_output_projection() -> None:
    def values(gm: fx.GraphModule) -> list[Site]:
        return [site for _, site in linear_sites(gm) if isinstance(site, Site) and site.products]

    model = seeded(Attention())
    (before,) = values(canonical(model, x_of(), seed=False))
    (after,) = values(deferred(model, x_of())[0])
    assert before.shiftable and after.shiftable
    assert [n.name for n in before.linears] == [n.name for n in after.linears]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(2, 300),
    spread=st.floats(0.0, 30.0),
    bits=st.integers(4, 8),
    seed=st.integers(0, 100),
)
def test_law_no_row_loses_its_largest_value(
    rows: int, columns: int, spread: float, bits: int, seed: int
) -> None:
    """The largest value of a row is 1, a value of every grid that fits [0, 1]."""
    scores = spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    lo, hi = torch.zeros(()), torch.ones(())
    rounded = UniformQuantizer.from_range(lo, hi, TensorSpec(bits=bits), None)(exponentials)
    assert torch.allclose(rounded.amax(-1), torch.ones(rows))


def long_attention() -> tuple[nn.Module, Tensor]:
    """One query looks at one token, all others at all 400 tokens evenly."""
    model = seeded(Attention())
    x = 0.05 * torch.randn(4, 400, 8, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 12.0
    return model, x


def test_even_attention_to_many_tokens_survives_eight_bits() -> None:
    model, x = long_attention()
    softmax_alone = replace(
        policies.minmax(8, 8), rules=(Rule(fed_by="softmax", spec=TensorSpec(bits=8)),)
    )
    with torch.no_grad():
        exact = model(x)
        plain, late = (
            relative_error(
                fxquant.compile(model, [x], replace(softmax_alone, defer_softmax=defer))(x), exact
            )
            for defer in (False, True)
        )
    assert late < plain / 10


def test_backends_agree(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = long_attention()
    qm = fxquant.compile(model, [x], policies.w8a8())
    assert qm.report.changes["DeferSoftmax"] == 1
    with torch.no_grad():
        simulated = qm(x)
        integer = qm.lower("integer")(x)
    assert relative_error(integer, simulated) < 1e-3
    qm.export_onnx(tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(output), simulated) < 1e-3
    qm.save(tmp_path / "saved")
    assert torch.equal(fxquant.load(tmp_path / "saved")(x), simulated)


def test_the_integer_only_preset_keeps_softmax() -> None:
    assert policies.w8a8().defer_softmax and not policies.w8a8(full=True).defer_softmax
    qm = fxquant.compile(seeded(Attention()), [x_of()], policies.w8a8(full=True))
    assert qm.lower("integer", integer_only=True)(x_of()).shape == (2, 5, 8)
