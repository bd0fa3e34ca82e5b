"""Chooses the bit-widths of an observed graph: measure, estimate, allocate."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, fx

from fxquant.calibration.observe import Observed
from fxquant.calibration.reservoir import ReservoirSampler, images_for
from fxquant.config.allocation import Allocation, Sensitivity
from fxquant.config.scale_search import GradientLoss
from fxquant.errors import CalibrationError, PolicyError
from fxquant.graph.capture import device_of
from fxquant.graph.fingerprint import fingerprint
from fxquant.mixed_precision.allocate.plan import Plan, allocate
from fxquant.mixed_precision.allocate.problem import Group, Problem
from fxquant.mixed_precision.allocate.result import AllocationResult, rank_correlation
from fxquant.mixed_precision.sensitivity.estimated import Estimates
from fxquant.mixed_precision.sensitivity.groups import EdgeGroup, WidthGroups
from fxquant.mixed_precision.sensitivity.loss_cache import LossCache
from fxquant.mixed_precision.sensitivity.measured import MeasuredSensitivity
from fxquant.mixed_precision.sensitivity.trial_quantizers import TrialQuantizers
from fxquant.policies.policy import Policy
from fxquant.utils.progress import track

_ALL_GROUPS = "all groups"


def reservoir_for(gm: fx.GraphModule, allocation: Allocation | None) -> ReservoirSampler:
    """A reservoir for the images that losses will be measured on.

    Args:
        gm: in stage OBSERVED.
        allocation: None keeps no images.
    """
    if allocation is None or allocation.sensitivity is Sensitivity.ESTIMATED:
        return ReservoirSampler(0, 0)
    count = allocation.images
    if count is None:
        macs_per_image = len(allocation.widths) * WidthGroups(gm).macs_after_groups()
        count = images_for(allocation.max_macs, macs_per_image)
    return ReservoirSampler(count, allocation.seed)


def check_budget(gm: fx.GraphModule, policy: Policy) -> None:
    """Checks that some widths are within the policy's budget, before any long computation.

    Args:
        gm: in stage OBSERVED, no data seen.
        policy: with an allocation.

    Raises:
        PolicyError: the budget cannot be met, or no edge has a width to choose.
    """
    options, width_groups = policy.allocation, WidthGroups(gm)
    assert options is not None
    if not width_groups.groups:
        raise PolicyError(
            f"policy {policy.name!r} has no width to choose: every quantized edge is pinned"
        )
    unknown = [(0.0,) * len(options.widths)] * len(width_groups.groups)
    _problem(width_groups, options, unknown).bounds(options.budget)


def choose_widths(
    gm: fx.GraphModule,
    picked: ReservoirSampler,
    seen: Observed,
    policy: Policy,
    cache: str | Path | None = None,
    progress: bool = False,
) -> tuple[dict[str, int], AllocationResult]:
    """A width for each edge that is not pinned, within the policy's budget.

    Args:
        gm: in stage OBSERVED, its observers with histograms, having seen data; not changed.
        picked: images that losses are measured on.
        seen: number of images, and rows of each product with gradients.
        policy: with an allocation that :func:`check_budget` accepts.
        cache: folder for measured losses, from which an interrupted search goes on; None keeps
            no files.
        progress: show progress on stderr.

    Returns:
        The width of each edge by name, and the result for the report.

    Raises:
        CalibrationError: losses cannot be measured or estimated for this model.
        FileFormatError: the file of measured losses is damaged.
        OutputError: the file of measured losses cannot be written.
    """
    options, search = policy.allocation, policy.samples
    assert options is not None and search is not None
    width_groups = WidthGroups(gm)
    trials = TrialQuantizers(
        gm,
        least_squares=policy.search is not None,
        allow_uniform=policy.search is not None and policy.search.search_region_ratio,
    )
    estimator = Estimates(gm, trials, seen.samples, search.metric, seen.images)
    estimates = {group: estimator.losses(group, options.widths) for group in width_groups.groups}
    if options.sensitivity is Sensitivity.ESTIMATED:
        problem = _problem(width_groups, options, _needed(width_groups, estimates))
        plan = allocate(problem, options.budget, options.method)
        return _result(width_groups, problem, plan, options, 0, None, None)
    images = picked.images.to(device_of(gm))
    losses = _MeasuredLosses(
        gm, width_groups, trials, images, policy, None if cache is None else Path(cache)
    )
    try:
        single_losses = losses.of_single_groups(options.widths, progress)
        problem = _problem(width_groups, options, single_losses)
        plan = allocate(
            problem,
            options.budget,
            options.method,
            measure=losses.of_all_groups,
            recheck=options.recheck,
        )
        total_loss = losses.of_all_groups(plan.bits)
    finally:
        losses.close()
    ranks = _correlation(single_losses, estimates)
    return _result(width_groups, problem, plan, options, len(images), total_loss, ranks)


class _MeasuredLosses:
    """Measured losses; losses on disk are not measured again."""

    def __init__(
        self,
        gm: fx.GraphModule,
        width_groups: WidthGroups,
        trials: TrialQuantizers,
        images: Tensor,
        policy: Policy,
        cache: Path | None,
    ) -> None:
        assert policy.samples is not None
        loss: GradientLoss = policy.samples.loss
        self._make_network = partial(MeasuredSensitivity, gm, trials, images, loss)
        self._groups = width_groups.groups
        key = fingerprint(gm, images, loss, *trials.settings, torch.get_num_threads())
        about = {"policy": policy.name, "images": len(images), "loss": str(loss)}
        self._cache = LossCache(cache, key, about)

    @cached_property
    def _network(self) -> MeasuredSensitivity:
        """The network to measure, made when the first loss is not on disk."""
        return self._make_network()

    def of_single_groups(self, widths: tuple[int, ...], progress: bool) -> list[tuple[float, ...]]:
        """The loss of each group at each width, with all other groups float."""
        unmeasured = [
            group
            for group in self._groups
            if any((group.name, (bits,)) not in self._cache for bits in widths)
        ]
        ordered = self._network.in_order(unmeasured) if unmeasured else []
        for group in track(
            ordered, label="measure sensitivities", total=len(unmeasured), enabled=progress
        ):
            for bits in widths:
                if (group.name, (bits,)) not in self._cache:
                    self._cache.put((group.name, (bits,)), self._network.of_group(group, bits))
        return [
            tuple(self._cache[group.name, (bits,)] for bits in widths) for group in self._groups
        ]

    def of_all_groups(self, bits: tuple[int, ...]) -> float:
        """The loss with all groups quantized, each at its width."""
        key = (_ALL_GROUPS, bits)
        if key not in self._cache:
            self._cache.put(key, self._network.of_all(self._groups, bits))
        return self._cache[key]

    def close(self) -> None:
        self._cache.close()


def _problem(
    width_groups: WidthGroups, options: Allocation, losses: list[tuple[float, ...]]
) -> Problem:
    return Problem(
        widths=options.widths,
        groups=tuple(
            Group(
                name=group.name,
                edges=tuple(edge.name for edge in group.edges),
                is_weight=group.is_weight,
                values=width_groups.values(group),
                losses=group_losses,
            )
            for group, group_losses in zip(width_groups.groups, losses, strict=True)
        ),
        fixed=width_groups.fixed,
        products=width_groups.products,
    )


def _needed(
    width_groups: WidthGroups, estimates: dict[EdgeGroup, list[float] | None]
) -> list[tuple[float, ...]]:
    """Estimates in the form of measured losses.

    Raises:
        CalibrationError: the estimate of a group is missing.
    """
    missing = [group.name for group in width_groups.groups if estimates[group] is None]
    if missing:
        raise CalibrationError(
            f"{missing[0]}: its loss cannot be estimated, since no rows of its product were "
            "sampled: choose measured sensitivities, or pin its width with a rule (pinned: true)",
            edge=missing[0],
        )
    return [tuple(estimates[group] or ()) for group in width_groups.groups]


def _correlation(
    single_losses: list[tuple[float, ...]], estimates: dict[EdgeGroup, list[float] | None]
) -> float | None:
    pairs = [
        pair
        for measured, estimated in zip(single_losses, estimates.values(), strict=True)
        if estimated is not None
        for pair in zip(measured, estimated, strict=True)
    ]
    return rank_correlation([m for m, _ in pairs], [e for _, e in pairs])


def _result(
    width_groups: WidthGroups,
    problem: Problem,
    plan: Plan,
    options: Allocation,
    images: int,
    total_loss: float | None,
    ranks: float | None,
) -> tuple[dict[str, int], AllocationResult]:
    widths = {
        edge.name: bits
        for group, bits in zip(width_groups.groups, plan.bits, strict=True)
        for edge in group.edges
    }
    return widths, AllocationResult(
        method=str(options.method),
        sensitivity=str(options.sensitivity),
        images=images,
        budget={str(cost): limit for cost, limit in options.budget.limits.items()},
        problem=problem,
        bits=plan.bits,
        loss=plan.loss,
        measured_loss=total_loss,
        costs={str(cost): value for cost, value in plan.costs.items()},
        rank_correlation=ranks,
    )
