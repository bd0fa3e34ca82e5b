"""Chooses the bit-widths of an observed graph: measure, estimate, allocate."""

from __future__ import annotations

from collections.abc import Callable
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

_TOGETHER = "all groups"


def reservoir_for(gm: fx.GraphModule, allocation: Allocation | None) -> ReservoirSampler:
    """What keeps the images that losses will be measured on.

    Args:
        gm: in stage OBSERVED.
        allocation: None keeps none.
    """
    if allocation is None or allocation.sensitivity is Sensitivity.ESTIMATED:
        return ReservoirSampler(0, 0)
    count = allocation.images
    if count is None:
        work = len(allocation.widths) * WidthGroups(gm).macs_after_groups()
        count = images_for(allocation.work, work)
    return ReservoirSampler(count, allocation.seed)


def check_budget(gm: fx.GraphModule, policy: Policy) -> None:
    """Looks whether there are widths within the policy's budget, before long work.

    Args:
        gm: in stage OBSERVED, no data seen.
        policy: with an allocation.

    Raises:
        PolicyError: the budget cannot be met, or no edge has a width to choose.
    """
    options, layout = policy.allocation, WidthGroups(gm)
    assert options is not None
    if not layout.groups:
        raise PolicyError(
            f"policy {policy.name!r} has no width to choose: every quantized edge is pinned"
        )
    unknown = [(0.0,) * len(options.widths)] * len(layout.groups)
    _problem(layout, options, unknown).bounds(options.budget)


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
        policy: with an allocation that :func:`check_budget` lets pass.
        cache: folder for measured losses, so that an interrupted search goes on; None keeps none.
        progress: show progress on stderr.

    Returns:
        Edge name -> bits, and what was found.

    Raises:
        CalibrationError: losses cannot be measured or estimated for this model.
        FileFormatError: the file of measured losses is damaged.
        OutputError: it cannot be written.
    """
    options, search = policy.allocation, policy.samples
    assert options is not None and search is not None
    layout = WidthGroups(gm)
    opt_m = policy.search is not None and policy.search.opt_m
    trials = TrialQuantizers(gm, least_squares=policy.search is not None, opt_m=opt_m)
    estimates = _estimate(
        layout, Estimates(gm, trials, seen.samples, search.metric, seen.images), options
    )
    if options.sensitivity is Sensitivity.ESTIMATED:
        problem = _problem(layout, options, _needed(layout, estimates))
        plan = allocate(problem, options.budget, options.method)
        return _result(layout, problem, plan, options, 0, None, None)
    images = picked.images.to(device_of(gm))
    losses = _Losses(gm, layout, trials, images, policy, None if cache is None else Path(cache))
    try:
        alone = losses.alone(options.widths, progress)
        problem = _problem(layout, options, alone)
        plan = allocate(
            problem,
            options.budget,
            options.method,
            measure=losses.together,
            recheck=options.recheck,
        )
        together = losses.together(plan.bits)
    finally:
        losses.close()
    ranks = _correlation(alone, estimates)
    return _result(layout, problem, plan, options, len(images), together, ranks)


class _Losses:
    """Measured losses, those on disk not measured again."""

    def __init__(
        self,
        gm: fx.GraphModule,
        layout: WidthGroups,
        trials: TrialQuantizers,
        images: Tensor,
        policy: Policy,
        cache: Path | None,
    ) -> None:
        assert policy.samples is not None
        loss: GradientLoss = policy.samples.loss
        self._network: Callable[[], MeasuredSensitivity] = lambda: MeasuredSensitivity(
            gm, trials, images, loss
        )
        self._running: MeasuredSensitivity | None = None
        self._groups = layout.groups
        key = fingerprint(gm, images, loss, *trials.settings, torch.get_num_threads())
        about = {"policy": policy.name, "images": len(images), "loss": str(loss)}
        self._cache = LossCache(cache, key, about)

    @property
    def _run(self) -> MeasuredSensitivity:
        """Made when the first loss is to be measured."""
        if self._running is None:
            self._running = self._network()
        return self._running

    def alone(self, widths: tuple[int, ...], progress: bool) -> list[tuple[float, ...]]:
        """The loss of each group at each width, the others float."""
        left = [
            group
            for group in self._groups
            if any((group.name, (bits,)) not in self._cache for bits in widths)
        ]
        ordered = self._run.in_order(left) if left else []
        for group in track(
            ordered, label="measure sensitivities", total=len(left), enabled=progress
        ):
            for bits in widths:
                if (group.name, (bits,)) not in self._cache:
                    self._cache.put((group.name, (bits,)), self._run.of_group(group, bits))
        return [
            tuple(self._cache[group.name, (bits,)] for bits in widths) for group in self._groups
        ]

    def together(self, bits: tuple[int, ...]) -> float:
        """The loss of all groups quantized."""
        key = (_TOGETHER, bits)
        if key not in self._cache:
            self._cache.put(key, self._run.of_all(self._groups, bits))
        return self._cache[key]

    def close(self) -> None:
        self._cache.close()


def _problem(layout: WidthGroups, options: Allocation, losses: list[tuple[float, ...]]) -> Problem:
    return Problem(
        widths=options.widths,
        groups=tuple(
            Group(
                name=group.name,
                edges=tuple(edge.name for edge in group.edges),
                is_weight=group.is_weight,
                values=layout.values(group),
                losses=found,
            )
            for group, found in zip(layout.groups, losses, strict=True)
        ),
        fixed=layout.fixed,
        products=layout.products,
    )


def _estimate(
    layout: WidthGroups, estimates: Estimates, options: Allocation
) -> dict[EdgeGroup, list[float] | None]:
    return {group: estimates.losses(group, options.widths) for group in layout.groups}


def _needed(
    layout: WidthGroups, estimates: dict[EdgeGroup, list[float] | None]
) -> list[tuple[float, ...]]:
    """Estimates as losses.

    Raises:
        CalibrationError: one is missing.
    """
    missing = [group.name for group in layout.groups if estimates[group] is None]
    if missing:
        raise CalibrationError(
            f"{missing[0]}: its loss cannot be estimated, since no rows of its product were "
            "sampled: choose measured sensitivities, or pin its width with a rule (pinned: true)"
        )
    return [tuple(estimates[group] or ()) for group in layout.groups]


def _correlation(
    alone: list[tuple[float, ...]], estimates: dict[EdgeGroup, list[float] | None]
) -> float | None:
    pairs = [
        pair
        for measured, estimated in zip(alone, estimates.values(), strict=True)
        if estimated is not None
        for pair in zip(measured, estimated, strict=True)
    ]
    return rank_correlation([m for m, _ in pairs], [e for _, e in pairs])


def _result(
    layout: WidthGroups,
    problem: Problem,
    plan: Plan,
    options: Allocation,
    images: int,
    together: float | None,
    ranks: float | None,
) -> tuple[dict[str, int], AllocationResult]:
    widths = {
        edge.name: bits
        for group, bits in zip(layout.groups, plan.bits, strict=True)
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
        measured_loss=together,
        costs={str(cost): value for cost, value in plan.costs.items()},
        rank_correlation=ranks,
    )
