"""SearchScales and CorrectBias as passes, and compile() with the policies that run them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant import policies, testing
from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.spec import Granularity, TensorSpec
from fxquant.config.vocabulary import Stage
from fxquant.errors import BatchError, CalibrationError, PassError
from fxquant.graph.edges import edges
from fxquant.graph.nodes import constant
from fxquant.passes import (
    AssignSpecs,
    CorrectBias,
    InsertObservers,
    PassResult,
    SearchScales,
    run_passes,
)
from fxquant.policies.policy import Policy, Rule
from fxquant.search.product_loss import ProductSample
from fxquant.testing import DIM, images, seeded, tokens
from tests.helpers.brute_force import BruteForce, quantizers
from tests.helpers.refusals import refused
from tests.helpers.stages import (
    FrozenSamples,
    canonical,
    frozen_with_samples,
    reasons,
    with_observers,
)

WEIGHT = TensorSpec(bits=4, symmetric=True, granularity=Granularity.CHANNEL)
WEIGHTS_ONLY = (Rule(arg="weight", spec=WEIGHT),)
FOUR = (Rule(arg="weight", spec=WEIGHT), Rule(spec=TensorSpec(bits=4)))
ROWS = ScaleSearch(rows=10_000, metric=Metric.HESSIAN)


def frozen(
    model: nn.Module, x: Tensor, rules: tuple[Rule, ...] = FOUR, search: ScaleSearch = ROWS
) -> FrozenSamples:
    return frozen_with_samples(with_observers(*rules, model=model, x=x), x, search)


@cache
def _block() -> FrozenSamples:
    return frozen(testing.Block(), tokens(24), policies.ptq4vit(4, 4).rules)


def block() -> FrozenSamples:
    gm, samples = _block()
    return copy.deepcopy(gm), samples


def search(gm: fx.GraphModule, samples: dict[str, ProductSample], **options: object) -> PassResult:
    item = SearchScales(samples, replace(ROWS, **options))
    return run_passes(gm, [item])["SearchScales"]


# SearchScales


@pytest.mark.parametrize("metric", list(Metric))
def test_products_come_closer_in_the_metric_searched(metric: Metric) -> None:
    gm, samples = block()
    before = sum(BruteForce(gm, samples, metric).losses().values())
    result = search(gm, samples, metric=metric)
    assert result.notes == () and result.changed > 10
    # By column the cosine has another meaning than by row, the one that is measured.
    limit = 1.0 if metric is Metric.COSINE else 0.9
    assert sum(BruteForce(gm, samples, metric).losses().values()) < limit * before


def test_a_scale_that_q_k_and_v_share_is_searched_for_all_three() -> None:
    gm, samples = block()
    readers = [e for e in edges(gm) if "qkv" in e.name and e.arg == "input"]
    assert len({str(e.source.target) for e in readers}) == 1 and len(readers) == 3
    name = str(readers[0].source.target)
    scales = set()
    for kept in ([0], [1], [2], [0, 1, 2]):
        # Of a product that the loss does not depend on, only the others count.
        with_gradients = {
            edge.node.name: replace(
                samples[edge.node.name],
                gradient=samples[edge.node.name].gradient if i in kept else None,
            )
            for i, edge in enumerate(readers)
        }
        again = copy.deepcopy(gm)
        search(again, {**samples, **with_gradients}, rounds=1)
        scales.add(float(again.get_submodule(name).scale))
    assert len(scales) > 1


def test_a_second_search_from_the_same_start_gives_the_same() -> None:
    (one, samples), (two, _) = block(), block()
    search(one, samples)
    search(two, samples)
    for name, quantizer in quantizers(one).items():
        assert torch.equal(quantizer.scale, quantizers(two)[name].scale)


def test_the_fitted_scale_stays_where_nothing_is_better() -> None:
    """Whole numbers that 4 bits hold exactly."""
    model = nn.Linear(DIM, 4)
    x = torch.randint(0, 16, (40, DIM)).float()
    x[0, 0], x[0, 1] = 0, 15
    gm = canonical(model, x)
    with torch.no_grad():
        for p in gm.parameters():
            p.copy_(torch.randint(-7, 8, p.shape))
            p[..., 0] = 7
    run_passes(gm, [AssignSpecs(FOUR), InsertObservers()])
    gm, samples = frozen_with_samples(gm, x, ROWS)
    assert search(gm, samples).changed == 0


def test_only_a_frozen_graph_is_searched() -> None:
    gm = canonical(testing.Block(), tokens())
    with refused(PassError, got=Stage.FLOAT, expected=Stage.FROZEN):
        search(gm, {})
    with refused(PassError, got=Stage.FLOAT, expected=Stage.FROZEN):
        run_passes(gm, [CorrectBias({})])


def test_what_is_not_searched_says_why_and_stays() -> None:
    rules = (
        Rule(arg="input", path="fc1", spec=TensorSpec(granularity=Granularity.CHANNEL)),
        *FOUR,
    )
    gm, samples = frozen(testing.Block(), tokens(4), rules)
    del samples["attn_proj"]
    before = {name: q.scale.clone() for name, q in quantizers(gm).items()}
    found = reasons(search(gm, samples))
    assert found == {
        "attn_proj__input": "its scale was not searched: no rows of the product were sampled",
        "attn_proj__weight": "its scale was not searched: no rows of the product were sampled",
        "fc1__input": "its scale was not searched: no output depends on one scale per channel of "
        "an activation alone",
    }
    for name in found:
        assert torch.equal(quantizers(gm)[f"quant.{name}"].scale, before[f"quant.{name}"])


# CorrectBias


def outputs(gm: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        return gm(x).movedim(1, -1).flatten(0, -2) if x.ndim == 4 else gm(x).flatten(0, -2)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(DIM, 6), lambda: tokens(30) + 0.7),
    "no bias": (lambda: nn.Linear(DIM, 6, bias=False), lambda: tokens(30) + 0.7),
    "groups": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), lambda: images(5) + 0.7),
    "conv, no bias": (lambda: nn.Conv2d(3, 6, 2, bias=False), lambda: images(5) + 0.7),
}


@pytest.mark.parametrize("name", MODELS)
def test_rounded_weights_leave_no_mean_error(name: str) -> None:
    make, data = MODELS[name]
    model, x = seeded(make()), data()
    gm, samples = frozen(model, x, WEIGHTS_ONLY)
    exact = outputs(model, x).mean(0)
    before = (outputs(gm, x).mean(0) - exact).abs().max()
    result = run_passes(gm, [CorrectBias(samples)])["CorrectBias"]
    after = (outputs(gm, x).mean(0) - exact).abs().max()
    assert result.changed == 1 and result.notes == ()
    assert float(after) < 1e-5 < 1e-3 < float(before)


@pytest.mark.parametrize("name", MODELS)
def test_rounded_weights_and_inputs_leave_the_error_of_the_inputs(name: str) -> None:
    make, data = MODELS[name]
    model, x = seeded(make()), data()
    gm, samples = frozen(model, x, FOUR)
    with torch.no_grad():
        quantizer = next(q for q in quantizers(gm).values() if not q.signed)
        expected = outputs(model, quantizer(x)).mean(0)
    run_passes(gm, [CorrectBias(samples)])
    torch.testing.assert_close(outputs(gm, x).mean(0), expected, rtol=1e-4, atol=1e-5)


def test_a_corrected_bias_is_not_corrected_again() -> None:
    gm, samples = block()
    assert run_passes(gm, [CorrectBias(samples)])["CorrectBias"].changed == 6
    once = gm(tokens())
    assert run_passes(gm, [CorrectBias(samples)])["CorrectBias"].changed == 0
    assert torch.equal(gm(tokens()), once)


def test_a_bias_that_stays_says_why() -> None:
    rules = (Rule(path="fc1", spec=None), *FOUR)
    gm, samples = frozen(testing.Block(), tokens(4), rules)
    del samples["fc2"]
    nodes = {n.name: n for n in gm.graph.nodes}
    before = [constant(gm, nodes[name].args[2]) for name in ("fc1", "fc2")]
    found = reasons(run_passes(gm, [CorrectBias(samples)])["CorrectBias"])
    assert found == {
        "fc1": "the bias is not corrected: the weight is float",
        "fc2": "the bias is not corrected: no rows of the product were sampled",
    }
    after = [constant(gm, nodes[name].args[2]) for name in ("fc1", "fc2")]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


# compile()


RECIPES: dict[str, Policy] = {
    "base_ptq": policies.base_ptq(4, 4),
    "ptq4vit": policies.ptq4vit(4, 4),
    "all": policies.ptq4vit(4, 4, reparameterize=True, bias_correction=True),
    "bias": replace(policies.minmax(4, 4), bias_correction=True),
}


def batches(size: int) -> list[Tensor]:
    return [images(6, size), images(3, size)]


@pytest.mark.parametrize(
    ("name", "recipe"), [("vit", "base_ptq"), ("vit", "bias"), ("vit", "all"), ("swin", "all")]
)
def test_compile_gives_the_same_twice(
    name: str, recipe: str, request: pytest.FixtureRequest
) -> None:
    model, size = request.getfixturevalue(name), {"vit": 16, "swin": 32}[name]
    one, two = (fxquant.compile(model, batches(size), RECIPES[recipe]) for _ in range(2))
    x = images(8, size)
    assert torch.equal(one(x), two(x))
    assert not one.report.left_float
    ran = {name for name, changed in one.report.changes.items() if changed}
    assert ("SearchScales" in ran) == (recipe != "bias")
    assert ("CorrectBias" in ran) == (recipe in ("all", "bias"))
    assert ("Reparameterize" in ran) == (recipe == "all")


def test_the_report_tells_what_was_not_searched(vit: nn.Module) -> None:
    rule = Rule(path=".*fc1", arg="input", spec=TensorSpec(granularity=Granularity.CHANNEL))
    policy = RECIPES["ptq4vit"].with_rules(rule)
    notes = fxquant.compile(vit, batches(16), policy).report.notes
    assert [(n.step, n.site) for n in notes if n.step == "SearchScales"] == [
        ("SearchScales", "blocks_0_mlp_fc1__input")
    ]


def stream(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from ((batch, torch.zeros(len(batch))) for batch in batches(size))


@pytest.fixture(scope="module")
def usual(vit: nn.Module) -> Tensor:
    """Outputs of the ViT compiled in the usual way."""
    output = fxquant.compile(vit, batches(16), RECIPES["ptq4vit"])(images(8, 16))
    assert isinstance(output, Tensor)
    return output


def test_a_generator_serves_a_search_but_no_second_reading(vit: nn.Module, usual: Tensor) -> None:
    once = fxquant.compile(vit, stream(16), RECIPES["ptq4vit"])
    assert once.report.images == 9
    assert torch.equal(once(images(8, 16)), usual)
    with refused(BatchError, expected="an iterable that can be read again"):
        fxquant.compile(vit, stream(16), RECIPES["all"])


def test_a_loss_of_the_users_steers_the_search(vit: nn.Module, usual: Tensor) -> None:
    def first_class(logits: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return logits[:, 0].square().sum()

    steered = fxquant.compile(vit, stream(16), RECIPES["ptq4vit"], loss=first_class)
    assert not torch.equal(steered(images(8, 16)), usual)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(
    vit: nn.Module, usual: Tensor, context: Callable[[], torch.no_grad]
) -> None:
    with context():
        other = fxquant.compile(vit, batches(16), RECIPES["ptq4vit"])
        assert torch.equal(other(images(8, 16)), usual)


def test_labels_of_another_length_are_no_labels(vit: nn.Module) -> None:
    def loss(logits: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is None
        return logits.square().sum()

    fxquant.compile(vit, [(images(4, 16), torch.tensor(3))], RECIPES["ptq4vit"], loss=loss)


def test_a_small_budget_is_refused_by_name(vit: nn.Module) -> None:
    policy = replace(RECIPES["ptq4vit"], search=ScaleSearch(memory_bytes=1000))
    with refused(CalibrationError, got=1000):
        fxquant.compile(vit, batches(16), policy)
