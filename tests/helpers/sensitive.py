"""Small models brought to stage OBSERVED with sampled rows, for tests of sensitivities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant import testing
from fxquant.calibration.observe import observe
from fxquant.config.scale_search import GradientLoss, ScaleSearch
from fxquant.config.spec import Granularity, Scheme, TensorSpec
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.mixed_precision.sensitivity.estimated import Estimates
from fxquant.mixed_precision.sensitivity.groups import WidthGroups
from fxquant.mixed_precision.sensitivity.measured import MeasuredSensitivity
from fxquant.mixed_precision.sensitivity.trial_quantizers import TrialQuantizers
from fxquant.policies.policy import Rule
from tests.helpers.stages import with_observers

EIGHT = TensorSpec()
ROWS = TensorSpec(symmetric=True, granularity=Granularity.CHANNEL)
HEADS = TensorSpec(symmetric=True, granularity=Granularity.HEAD)
TWIN = TensorSpec(scheme=Scheme.TWIN_UNIFORM)
RULES = (
    Rule(fed_by="gelu", spec=TWIN, optional=True),
    Rule(arg=Arg.WEIGHT, spec=ROWS),
    Rule(op=OpKind.MATMUL, spec=HEADS, optional=True),
    Rule(spec=EIGHT),
)


class Classifier(nn.Module):
    """A block, and logits of its mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = testing.Block(), nn.Linear(testing.DIM, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(x).mean(1))
        return logits


class Patches(nn.Module):
    """A convolution with groups and a scale for each channel of its input, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 6, 2, stride=2, groups=2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(torch.cat([x, x[:, :1]], 1)).flatten(2).mean(2))
        return logits


class Setup:
    """A model brought to stage OBSERVED with its samples."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        rules: tuple[Rule, ...] = RULES,
        search: ScaleSearch = ScaleSearch(loss=GradientLoss.SAMPLED, rows=4096),  # noqa: B008
    ) -> None:
        self.x, self.search = x, search
        self.gm = with_observers(*rules, model=model, x=x, histograms=True)
        seen = observe(self.gm, [(x, None)], search)
        self.samples, self.seen = seen.samples, seen.images
        self.layout = WidthGroups(self.gm)
        self.trials = TrialQuantizers(self.gm, least_squares=True)

    def network(self) -> MeasuredSensitivity:
        return MeasuredSensitivity(self.gm, self.trials, self.x, self.search.loss)

    def measured(self, widths: tuple[int, ...]) -> dict[str, list[float]]:
        network = self.network()
        return {
            group.name: [network.of_group(group, bits) for bits in widths]
            for group in network.in_order(self.layout.groups)
        }

    def estimated(self, widths: tuple[int, ...]) -> dict[str, list[float] | None]:
        estimates = Estimates(self.gm, self.trials, self.samples, self.search.metric, self.seen)
        return {group.name: estimates.losses(group, widths) for group in self.layout.groups}
