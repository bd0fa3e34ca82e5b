"""AttachLowRank as a pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant import LowRank, policies
from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.spec import Granularity, TensorSpec
from fxquant.config.vocabulary import Stage
from fxquant.errors import PassError
from fxquant.graph.edges import edges
from fxquant.graph.nodes import submodule
from fxquant.graph.products import weighted_products
from fxquant.passes import (
    AttachLowRank,
    CorrectBias,
    PassResult,
    run_passes,
)
from fxquant.passes.attach_low_rank import _site
from fxquant.policies.policy import Rule
from fxquant.quantizers import TwinUniformQuantizer
from fxquant.search.product_loss import ProductSample
from fxquant.testing import DIM, TOKENS, Block, images, op_names, seeded, tokens
from fxquant.utils.notes import Refusal
from tests.helpers.refusals import refused
from tests.helpers.stages import (
    EIGHT,
    WEIGHT,
    FrozenSamples,
    canonical,
    frozen_with_samples,
    reasons,
    with_observers,
)

COARSE = replace(WEIGHT, bits=3)
W3A8 = (Rule(arg="weight", spec=COARSE), Rule(spec=EIGHT))
ROWS = ScaleSearch(rows=10_000, metric=Metric.FISHER)


def frozen(model: nn.Module, x: Tensor, rules: tuple[Rule, ...] = W3A8) -> FrozenSamples:
    return frozen_with_samples(with_observers(*rules, model=model, x=x), x, ROWS)


@cache
def _block() -> FrozenSamples:
    return frozen(Block(), tokens(24))


def block() -> FrozenSamples:
    gm, samples = _block()
    return copy.deepcopy(gm), samples


def attach(gm: fx.GraphModule, samples: dict[str, ProductSample], **options: object) -> PassResult:
    item = AttachLowRank(samples, LowRank(**(options or {"rank": 2})))
    return run_passes(gm, [item])["AttachLowRank"]


def ranks(gm: fx.GraphModule) -> dict[str, int]:
    """Rank of the branch next to each linear that has one."""
    return {
        edge.node.name.removesuffix("_up"): int(edge.node.args[0].meta["val"].shape[-1])
        for edge in edges(gm)
        if edge.name.endswith("_up__input")
    }


def output_error(gm: fx.GraphModule, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((gm(x) - model(x)).square().mean())


def test_a_linear_gets_a_branch_whose_parts_are_nodes_like_any_other() -> None:
    gm, samples = frozen(nn.Linear(DIM, 6), tokens(40))
    result = attach(gm, samples)
    quantizer = "UniformQuantizer"
    assert op_names(gm) == [
        *(quantizer, quantizer),  # of input and weight
        *(quantizer, "linear"),
        *(quantizer, quantizer, "linear"),
        *("linear", "add"),
    ]
    found = {edge.name: edge for edge in edges(gm)}
    assert list(found) == [
        *("linear_down__input", "linear_down__weight", "linear_up__input", "linear_up__weight"),
        *("linear__input", "linear__weight"),
    ]
    assert found["linear_down__input"].source is found["linear__input"].source
    assert found["linear_down__input"].spec == EIGHT == found["linear_up__input"].spec
    assert found["linear_down__weight"].spec == WEIGHT == found["linear_up__weight"].spec
    assert [q.scale.numel() for q in map(submodule_of(gm), found.values())] == [1, 2, 1, 6, 1, 6]
    (gain,) = result.comparisons
    # 2 (8 + 6) multiplications on 48; as many bytes, and 6 + 2 + 1 scales.
    assert gain.choice == "branch of rank 2, +58.3% multiplications, +64 bytes"
    assert result.changed == 1 and result.notes == () and gain.error_ratio < 0.98


def submodule_of(gm: fx.GraphModule) -> Callable[..., nn.Module]:
    return lambda edge: submodule(gm, edge.source)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_function_comes_closer_with_each_rank(rank: int) -> None:
    model, x = seeded(nn.Linear(DIM, 6)), tokens(40)
    gm, samples = frozen(model, x)
    before = output_error(gm, model, x)
    (gain,) = attach(gm, samples, rank=rank).comparisons
    after = output_error(gm, model, x)
    assert after < before * {1: 0.8, 2: 0.6, 4: 0.3}[rank]
    assert gain.error_ratio < 1


def test_at_full_rank_the_error_of_the_weight_is_gone() -> None:
    """What is left is that of 8-bit activations and factors."""
    model, x = seeded(nn.Linear(DIM, 6)), tokens(40)
    (gm, samples), (fine, _) = frozen(model, x), frozen(model, x, (Rule(spec=EIGHT),))
    before = output_error(gm, model, x)
    attach(gm, samples, rank=100)
    assert ranks(gm) == {"linear": 6}
    assert output_error(gm, model, x) < 3 * output_error(fine, model, x) < before / 20


def test_every_linear_of_a_block_gets_one_twins_and_shared_inputs_too() -> None:
    model, x = seeded(Block()), tokens(24)
    gm, samples = frozen(Block(), x, policies.ptq4vit(3, 6).rules)
    before = output_error(gm, model, x)
    result = attach(gm, samples)
    assert result.changed == 6 and result.notes == ()
    assert ranks(gm) == dict.fromkeys(
        ("attn_qkv", "attn_qkv_1", "attn_qkv_2", "attn_proj", "fc1", "fc2"), 2
    )
    by_name = {edge.name: edge.source for edge in edges(gm)}
    assert len({by_name[f"attn_qkv{part}__input"] for part in ("", "_1", "_down", "_1_down")}) == 1
    assert isinstance(submodule(gm, by_name["fc2_down__input"]), TwinUniformQuantizer)
    assert output_error(gm, model, x) < 0.8 * before


class Adapter(nn.Module):
    """Modules that are called what the parts of a branch are called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fc_down, self.fc_up = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.fc_up(self.fc_down(x))


def test_names_that_are_taken_stay_with_their_modules() -> None:
    model, x = seeded(Adapter()), tokens(40)
    gm, samples = frozen(model, x)
    before = output_error(gm, model, x)
    assert attach(gm, samples).changed == 3
    names = [edge.name for edge in edges(gm)]
    assert len(set(names)) == len(names) == 18
    assert output_error(gm, model, x) < 0.7 * before


@pytest.mark.parametrize("options", [{"rank": 2}, {"share": 0.5}])
def test_a_second_run_changes_nothing(options: dict[str, float]) -> None:
    gm, samples = block()
    assert attach(gm, samples, **options).changed > 0
    names, once = op_names(gm), gm(tokens())
    assert attach(gm, samples, **options) == PassResult(0)
    assert op_names(gm) == names and torch.equal(gm(tokens()), once)


def test_only_a_frozen_graph_gets_branches() -> None:
    with refused(PassError, got=Stage.FLOAT, expected=Stage.FROZEN):
        attach(canonical(Block(), tokens()), {})


def test_a_linear_without_a_branch_says_why() -> None:
    rules = (
        Rule(path="attn.proj", arg="input", spec=TensorSpec(granularity=Granularity.CHANNEL)),
        Rule(path="fc1", arg="weight", spec=None),
        Rule(path="fc2", arg="input", spec=None),
        *W3A8,
    )
    gm, samples = frozen(Block(), tokens(24), rules)
    del samples["attn_qkv_1"]
    result = attach(gm, samples)
    assert reasons(result) == {
        "attn_qkv_1": "no branch: no rows of the product were sampled",
        "attn_proj": "no branch: the input has a scale per channel",
        "fc1": "no branch: the weight is float",
        "fc2": "no branch: the input is float, so that the product is float",
    }
    assert ranks(gm) == {"attn_qkv": 2, "attn_qkv_2": 2}


def test_a_convolution_stays() -> None:
    gm, samples = frozen(nn.Conv2d(3, 4, 2), images(6))
    before = op_names(gm)
    assert reasons(attach(gm, samples)) == {"conv": "no branch: it is a convolution"}
    assert op_names(gm) == before


def test_a_branch_that_lowers_no_error_is_left_out() -> None:
    """Two bits of the input make nearly all of the error, which a branch cannot lower."""
    rules = (Rule(arg="weight", spec=replace(WEIGHT, bits=8)), Rule(spec=TensorSpec(bits=2)))
    gm, samples = frozen(nn.Linear(DIM, 6), tokens(40), rules)
    before = op_names(gm)
    (reason,) = reasons(attach(gm, samples)).values()
    assert reason.startswith("no branch: the output error would fall from ")
    assert op_names(gm) == before


def test_a_corrected_mean_stays_corrected() -> None:
    model, x = seeded(nn.Linear(DIM, 6)), tokens(40) + 0.7
    gm, samples = frozen(
        model, x, (Rule(arg="weight", spec=COARSE), Rule(spec=TensorSpec(bits=12)))
    )
    run_passes(gm, [CorrectBias(samples)])
    before = output_error(gm, model, x)
    assert attach(gm, samples).changed == 1
    with torch.no_grad():
        assert float((gm(x) - model(x)).mean((0, 1)).abs().max()) < 1e-3
    assert output_error(gm, model, x) < 0.7 * before


class TokensAndMean(nn.Module):
    """A linear that reads every token, and one that reads their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.each(x).mean(1))
        return logits


def test_an_error_counts_for_all_rows_of_an_image() -> None:
    gm, samples = frozen(TokensAndMean(), tokens(40))
    names = {product.node.name: product for product in weighted_products(gm)}
    sites = {name: _site(product, samples.get(name)) for name, product in names.items()}
    each, head = sites["each"], sites["head"]
    assert not isinstance(each, Refusal) and not isinstance(head, Refusal)
    assert (each.worth(by_loss=True), head.worth(by_loss=True)) == (TOKENS, 1)
    # Without the loss, an error counts relative to the size of the output.
    size = float((each.inputs @ each.weight.t()).square().sum(1).mean())
    assert each.worth(by_loss=False) == pytest.approx(1 / size, rel=1e-4)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_mean_error_counts_unless_the_bias_takes_it(corrected: bool) -> None:
    gm, samples = frozen(nn.Linear(DIM, 6), tokens(40))
    if corrected:
        run_passes(gm, [CorrectBias(samples)])
    (product,) = weighted_products(gm)
    site = _site(product, samples[product.node.name])
    assert not isinstance(site, Refusal)
    nothing, shifted = torch.zeros(len(site.rows), 6), torch.ones(len(site.rows), 6)
    plain, moved = site.error(nothing), site.error(shifted)
    assert site.error(None) == pytest.approx(plain)
    assert (moved == pytest.approx(plain, rel=1e-3)) == corrected


def test_a_share_of_bytes_goes_to_some_layers_and_is_kept() -> None:
    gm, samples = block()
    before = fxquant.graph.parameter_bytes.quantized_bytes(gm)
    whole = 8 * DIM * DIM * 3 // 8
    result = attach(gm, samples, share=0.5)
    found = ranks(gm)
    assert 0 < len(found) < 6 and max(found.values()) <= DIM // 2
    assert set(found) | set(reasons(result)) == {
        *("attn_qkv", "attn_qkv_1", "attn_qkv_2", "attn_proj", "fc1", "fc2")
    }
    assert "no branch: other layers gain more for the same bytes" in reasons(result).values()
    assert 0 < fxquant.graph.parameter_bytes.quantized_bytes(gm) - before <= 0.5 * whole


class Windows(nn.Module):
    """Two linears, the first of them over parts of the tokens, as Swin's windows are.

    Args:
        size: tokens in a part.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.one, self.two, self.size = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), size

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x.reshape(-1, self.size, DIM)).relu().reshape(x.shape)
        return self.two(y).mean(1)


def test_windows_are_no_images() -> None:
    """How the rows of a layer are arranged is nothing to what its error costs."""
    found = []
    for size in (1, TOKENS):
        gm, samples = frozen(Windows(size), tokens(24))
        attach(gm, samples, share=3.0)
        found.append(ranks(gm))
    assert found[0] == found[1] and len(set(found[0].values())) == 2


def test_a_share_as_a_rank_is_one_of_the_channels() -> None:
    gm, samples = frozen(nn.Linear(DIM, 6), tokens(40))
    attach(gm, samples, rank=0.4)
    assert ranks(gm) == {"linear": 2}
