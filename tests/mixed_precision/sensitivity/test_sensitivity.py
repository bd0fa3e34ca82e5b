"""Losses of groups at widths: measured, estimated, kept on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fxquant import testing
from fxquant.calibration import row_samplers
from fxquant.calibration.network_loss import OutputDistance
from fxquant.calibration.reservoir import ReservoirSampler
from fxquant.config.scale_search import GradientLoss, Metric, ScaleSearch
from fxquant.config.spec import Granularity, ObserverKind, TensorSpec
from fxquant.config.vocabulary import Arg
from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.graph.edges import fed_by, quantized_edges
from fxquant.graph.fingerprint import fingerprint
from fxquant.mixed_precision.allocate.result import rank_correlation
from fxquant.mixed_precision.sensitivity.estimated import Estimates
from fxquant.mixed_precision.sensitivity.trial_quantizers import TrialQuantizers
from fxquant.passes import AllocateBits, Freeze, InsertObservers, run_passes
from fxquant.policies.policy import Rule
from fxquant.quantizers import TwinUniformQuantizer, UniformQuantizer
from fxquant.testing import images, seeded, tokens
from tests.helpers.refusals import refused
from tests.helpers.sensitive import EIGHT, ROWS, RULES, TWIN, Classifier, Patches, Setup
from tests.helpers.stages import annotated


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup(Classifier(), tokens(64))


# Measured


def test_losses_fall_with_the_width_and_vanish_where_it_is_wide() -> None:
    gaussian = tuple(rule for rule in RULES if rule.spec is not TWIN)
    setup = Setup(Classifier(), tokens(64), gaussian)
    for name, losses in setup.measured((2, 4, 8, 16)).items():
        assert losses[0] > 4 * losses[1] > 16 * losses[2], name
        assert losses[3] < 1e-6 < losses[0], name


def test_a_loss_is_that_of_the_frozen_network_with_one_group_quantized(setup: Setup) -> None:
    """Started from cached values or not, the same numbers come out."""
    plain = seeded(Classifier())(setup.x).detach()
    distance = OutputDistance(plain, GradientLoss.SAMPLED)
    measured = setup.measured((3,))
    for name in (
        "block_attn_qkv__input",
        "block_attn_matmul__rhs",
        "block_fc2__input",
        "head__weight",
    ):
        losses = measured[name]
        gm, _ = annotated(*RULES, model=Classifier(), x=setup.x)
        group = next(g for g in setup.layout.groups if g.name == name)
        kept = {edge.name for edge in group.edges}
        for edge in list(quantized_edges(gm)):
            specs = dict(edge.node.meta["quant"])
            spec = specs.pop(edge.arg)
            if edge.name in kept:
                specs[edge.arg] = TensorSpec(
                    scheme=spec.scheme,
                    symmetric=spec.symmetric,
                    granularity=spec.granularity,
                    observer=ObserverKind.MSE,
                )
            edge.node.meta["quant"] = specs
        run_passes(gm, [InsertObservers()])
        gm(setup.x)
        run_passes(gm, [AllocateBits(dict.fromkeys(kept, 3)), Freeze()])
        # Weights are fitted on their values here, by Freeze on a histogram of them.
        expected = distance(gm(setup.x))
        assert losses[0] == pytest.approx(expected, rel=0.3 if group.is_weight else 1e-4), name


def test_measuring_leaves_the_graph_and_its_observers_as_they_are(setup: Setup) -> None:
    before = fingerprint(setup.gm, setup.x)
    code = setup.gm.code
    setup.measured((4,))
    assert fingerprint(setup.gm, setup.x) == before and setup.gm.code == code


def test_groups_together_at_sixteen_bits_are_the_float_network() -> None:
    setup = Setup(Classifier(), tokens(64), tuple(r for r in RULES if r.spec is not TWIN))
    network, groups = setup.network(), setup.layout.groups
    wide = network.of_all(groups, [16] * len(groups))
    assert wide < 1e-6 < network.of_all(groups, [3] * len(groups))
    one = [16] * len(groups)
    one[0] = 3
    assert network.of_all(groups, one) == pytest.approx(
        setup.measured((3,))[groups[0].name][0], rel=1e-2
    )


def test_outputs_that_are_no_logits_are_compared_by_squares() -> None:
    one, two = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert OutputDistance(one, GradientLoss.SAMPLED)(two) == 6  # 12 values an image, half of each
    logits = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    moved = logits + 5  # the same probabilities
    assert OutputDistance(logits, GradientLoss.MARGIN)(moved) < 1e-12
    assert OutputDistance(logits, GradientLoss.GAUSSIAN)(moved) == pytest.approx(25)
    shares = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * torch.tensor([2, 2 / 3]).log().sum()
    assert OutputDistance(shares[0], GradientLoss.MARGIN)(shares[1]) == pytest.approx(expected)
    both = {"logits": logits, "boxes": one, "kept": torch.tensor([1, 2])}
    found = OutputDistance(both, GradientLoss.MARGIN)({**both, "logits": moved, "boxes": two})
    assert found == pytest.approx(6)


def test_a_model_without_float_outputs_has_no_loss() -> None:
    with pytest.raises(CalibrationError, match="remove the argmax from the model"):
        OutputDistance(torch.tensor([1, 2]), GradientLoss.MARGIN)


def test_outputs_that_are_not_finite_name_the_group() -> None:
    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(testing.DIM, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = 1 / self.two(self.one(x).mean(1))
            return logits

    model = Inverse()
    setup = Setup(model, tokens(64), (Rule(path="two", arg=Arg.INPUT, spec=EIGHT),))
    with torch.no_grad():
        setup.gm.get_parameter("two.bias").zero_()
        setup.gm.get_parameter("two.weight").copy_(torch.eye(3))  # what rounds to 0 ends infinite
    text = r"two__input at 2 bits .*pinned: true"
    with refused(NonFiniteError, text, expected="a finite number") as caught:
        setup.measured((2,))
    assert not math.isfinite(caught.value.got)


# Estimated


def test_estimates_rank_groups_as_measurements_do(setup: Setup) -> None:
    widths = (3, 4, 5, 6, 8)
    measured, estimated = setup.measured(widths), setup.estimated(widths)
    pairs = [
        (one, two)
        for name, losses in measured.items()
        for one, two in zip(losses, estimated[name] or [], strict=True)
    ]
    assert len(pairs) == 5 * len(setup.layout.groups)
    ranks = rank_correlation([one for one, _ in pairs], [two for _, two in pairs])
    assert ranks is not None and ranks > 0.9
    # The sampled gradient is that of the same divergence, so that sizes agree as well.
    ratios = torch.tensor([two / one for one, two in pairs])
    assert 1 / 3 < float(ratios.median()) < 3


@pytest.mark.parametrize(
    ("rows", "queries"),
    [(320, 32), (320, 2), (1 << 14, 2)],
    ids=["fewer samples", "fewer samples and rows of each", "fewer rows of each"],
)
@pytest.mark.parametrize("metric", [Metric.FISHER, Metric.HESSIAN])
def test_estimates_do_not_depend_on_how_many_rows_are_sampled(
    metric: Metric, rows: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimated(rows: int) -> dict[str, list[float] | None]:
        search = ScaleSearch(metric=metric, loss=GradientLoss.SAMPLED, rows=rows)
        return Setup(Classifier(), tokens(256), search=search).estimated((4,))

    whole = estimated(1 << 14)
    monkeypatch.setattr(row_samplers, "_QUERIES_PER_SAMPLE", queries)
    few = estimated(rows)
    for name, losses in whole.items():
        assert losses is not None
        assert few[name] == pytest.approx(losses, rel=0.5), name


def test_rows_that_the_loss_does_not_reach_are_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FirstToken(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.block(x)[:, 0])
            return logits

    search = ScaleSearch(metric=Metric.FISHER, loss=GradientLoss.SAMPLED, rows=1 << 14)
    whole = Setup(FirstToken(), tokens(256), search=search).estimated((4,))
    monkeypatch.setattr(row_samplers, "_QUERIES_PER_SAMPLE", 2)
    few = Setup(FirstToken(), tokens(256), search=search).estimated((4,))
    for name in ("block_attn_matmul__lhs", "block_attn_matmul_1__lhs"):
        assert few[name] == pytest.approx(whole[name], rel=0.1), name


def test_scales_along_the_channels_of_a_convolution_are_estimated() -> None:
    channels = TensorSpec(granularity=Granularity.CHANNEL)
    rules = (Rule(arg=Arg.WEIGHT, spec=ROWS), Rule(spec=channels))
    setup = Setup(Patches(), images(64, 8), rules)
    measured, estimated = setup.measured((3,)), setup.estimated((3,))
    for name in ("conv__input", "conv__weight", "head__input", "head__weight"):
        found = estimated[name]
        assert found is not None and found[0] == pytest.approx(measured[name][0], rel=0.8), name


def test_a_group_whose_products_were_not_sampled_has_no_estimate(setup: Setup) -> None:
    samples = {name: s for name, s in setup.samples.items() if name != "block_fc1"}
    estimates = Estimates(setup.gm, setup.trials, samples, Metric.FISHER, setup.seen)
    by_name = {group.name: estimates.losses(group, (4,)) for group in setup.layout.groups}
    assert by_name["block_fc1__input"] is None and by_name["block_fc2__input"] is not None


# Images


def batches(count: int) -> Iterator[tuple[Tensor, None]]:
    for start in range(0, count, 3):
        yield torch.arange(start, min(start + 3, count)).float().view(-1, 1), None


def test_the_choice_of_images_is_uniform_and_repeatable() -> None:
    counts = torch.zeros(10)
    for seed in range(400):
        picked = ReservoirSampler(4, seed)
        assert sum(len(images) for images, _ in picked.observe(batches(10))) == 10
        chosen = picked.images.flatten().long()
        assert len(set(chosen.tolist())) == 4 and chosen.tolist() == sorted(chosen.tolist())
        counts[chosen] += 1
    assert float((counts / 400 - 0.4).abs().max()) < 0.1
    again = ReservoirSampler(4, 399)
    list(again.observe(batches(10)))
    assert torch.equal(again.images.flatten().long(), chosen)


def test_fewer_images_than_wanted_are_all_taken() -> None:
    picked = ReservoirSampler(8, 0)
    list(picked.observe(batches(5)))
    assert picked.images.flatten().tolist() == [0, 1, 2, 3, 4]


def test_a_uniform_grid_stands_in_for_twins_where_the_ratio_is_searched(setup: Setup) -> None:
    (edge,) = (e for g in setup.layout.groups for e in g.edges if fed_by(e) == "gelu")
    kinds = {
        allowed: [type(trials.quantizer(edge, bits)) for bits in (2, 3, 4)]
        for allowed in (False, True)
        for trials in [TrialQuantizers(setup.gm, least_squares=True, allow_uniform=allowed)]
    }
    assert set(kinds[False]) == {TwinUniformQuantizer}
    assert UniformQuantizer in kinds[True]
