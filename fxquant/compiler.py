"""``compile()``: the pipeline in order, nothing else."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.calibration.calibrate import calibrate
from fxquant.calibration.loader import CalibrationImages
from fxquant.calibration.sample_products import sample_products
from fxquant.calibration.user_loss import Loss, check_callable
from fxquant.compiled.model import CompiledModel
from fxquant.compiled.report import Report, make_plan, measure_sqnr
from fxquant.config.scale_search import GRADIENT_METRICS
from fxquant.errors import OutputError, PolicyError
from fxquant.graph.capture import capture, check_model
from fxquant.graph.parameter_bytes import quantized_bytes
from fxquant.mixed_precision.allocate.result import AllocationResult
from fxquant.mixed_precision.choose import check_budget, choose_widths, reservoir_for
from fxquant.passes import (
    AllocateBits,
    AssignSpecs,
    AttachLowRank,
    Compensate,
    CorrectBias,
    Freeze,
    InsertObservers,
    PassResult,
    QuantizeBias,
    Reconstruct,
    Reparameterize,
    SearchScales,
    SmoothWithBias,
    run_passes,
)
from fxquant.passes.canonical.canonicalize import FloatModel, canonicalize
from fxquant.policies.policy import Policy
from fxquant.policies.policy_file import policy_to_dict, resolve
from fxquant.reconstruction.blockwise import BlockwiseRunner, all_images
from fxquant.reconstruction.training import split
from fxquant.search.product_loss import ProductSample
from fxquant.smoothing.choose import FoldDecisions, choose_smoothing
from fxquant.smoothing.norm_ranges import norm_ranges
from fxquant.utils.files import check_writable
from fxquant.utils.progress import track, working

# Images that the float model is looked at with, and that the report's SQNR is measured on.
_FEW = 8


@torch.inference_mode(mode=False)  # its tensors have no gradients, which a search may need
def compile(
    model: nn.Module,
    calib_loader: Iterable[Any],
    policy: str | Path | Policy | Mapping[str, Any] = "w8a8",
    *,
    loss: Loss | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> CompiledModel:
    """Quantizes a vision transformer after training.

    Args:
        model: in eval mode, taking one float image tensor ``(B, C, H, W)``; not changed.
        calib_loader: calibration batches: tensors, ``(images, labels)`` pairs, dicts, or a
            DataLoader of these; 32 images are usual. No generator for a policy that smooths,
            reparameterizes, compensates or reconstructs, which reads them twice.
        policy: preset name, Policy, dict, or path of a YAML file.
        loss: of the model's outputs and the labels (None where there are none) of up to four
            images, one number, summed over the images; its gradient weighs errors instead of that
            of the loss which the search names. What smoothing and allocation measure stays the
            divergence from the float outputs.
        cache: folder for the losses that a policy with an allocation measures and the blocks that
            one with a reconstruction trains; an interrupted run goes on where it stopped, given
            the same threads, device, and images in the same order.
        progress: show the progress of long steps on stderr.

    Returns:
        The quantized model.

    Raises:
        CaptureError: the model cannot be captured, or holds nothing to quantize.
        PolicyError: the policy is malformed or does not fit the model.
        CalibrationError: calibration data or loss cannot be used, or the model gives NaN.
        OutputError: the cache is no path, or cannot be written.
    """
    recipe = resolve(policy)
    _check_options(recipe, loss, cache)
    check_model(model)
    twice = recipe.smooth or recipe.reparameterize or recipe.recovers
    images = CalibrationImages(calib_loader, twice=twice)
    clock = _Clock()
    with working("capture", enabled=progress):
        gm = capture(model, images.first)
        results, original = canonicalize(gm, images.first[:_FEW])
    clock.lap("capture")
    if recipe.reparameterize:
        ranges = norm_ranges(gm, track(images, label="ranges", total=len(images), enabled=progress))
        results |= run_passes(gm, (Reparameterize(ranges),))
        clock.lap("reparameterize")
    results |= _annotate(gm, recipe)
    samples: dict[str, ProductSample] = {}
    if recipe.smooth:
        choices = _choose_smoothing(gm, images, recipe, loss, progress)
        results |= run_passes(gm, (SmoothWithBias(choices),))
        samples = choices.samples
        clock.lap("smooth")
    # Every width is fitted from the same histograms.
    results |= run_passes(gm, (InsertObservers(histograms=recipe.allocation is not None),))
    picked = reservoir_for(gm, recipe.allocation)
    batches = picked.observe(_shown(images, "calibrate", progress))
    if recipe.samples is None or samples:
        seen = calibrate(gm, (batch for batch, _ in batches))
    else:
        samples, seen = sample_products(gm, batches, recipe.samples, loss)
    clock.lap("calibrate")
    outcome: AllocationResult | None = None
    if recipe.allocation is not None:
        widths, outcome = choose_widths(gm, picked, samples, seen, recipe, cache, progress)
        results |= run_passes(gm, (AllocateBits(widths),))
        clock.lap("allocate")
    results |= run_passes(gm, (Freeze(),))
    clock.lap("fit")
    if recipe.search is not None:
        results |= run_passes(gm, (SearchScales(samples, recipe.search, progress),))
        clock.lap("search")
    results |= _recover(gm, images, recipe, samples, cache, clock, progress)
    results |= run_passes(gm, (QuantizeBias(),))
    clock.lap("fit")
    report = _report(gm, original, recipe, results, seen, clock, outcome)
    return CompiledModel(gm, report, policy_to_dict(recipe), tuple(images.first.shape[1:]))


def _recover(
    gm: fx.GraphModule,
    images: CalibrationImages,
    recipe: Policy,
    samples: Mapping[str, ProductSample],
    cache: str | Path | None,
    clock: _Clock,
    progress: bool,
) -> dict[str, PassResult]:
    """What is done to weights and biases once scales are fixed."""
    results: dict[str, PassResult] = {}
    sides: BlockwiseRunner | None = None
    if recipe.recovers:  # with the weights and biases as they are before all this
        sides = BlockwiseRunner(gm, all_images(images), progress=progress)
    if recipe.bias_correction:
        results |= run_passes(gm, (CorrectBias(samples),))
        clock.lap("fit")
    if recipe.low_rank is not None:
        results |= run_passes(gm, (AttachLowRank(samples, recipe.low_rank),))
        clock.lap("branches")
    if sides is not None and recipe.compensation is not None:
        fitted = sides
        if recipe.reconstruction is not None:  # those that judge are new to the rounding
            options = recipe.reconstruction
            _, own = split(len(sides.images), options.held_out, options.seed)
            fitted = sides.on(sides.images[own])
        results |= run_passes(gm, (Compensate(fitted, recipe.compensation),))
        clock.lap("compensate")
    if sides is not None and recipe.reconstruction is not None:
        folder = None if cache is None else Path(cache)
        results |= run_passes(gm, (Reconstruct(sides, recipe.reconstruction, folder),))
        clock.lap("reconstruct")
    return results


def _annotate(gm: fx.GraphModule, recipe: Policy) -> dict[str, PassResult]:
    """Rules become annotations; a budget that they cannot meet is refused before the long work."""
    results = run_passes(gm, (AssignSpecs(recipe.rules),))
    if recipe.allocation is not None:
        observed = fx.GraphModule(gm, copy.deepcopy(gm.graph))  # shares the parameters
        observed.meta = dict(gm.meta)
        run_passes(observed, (InsertObservers(),))
        check_budget(observed, recipe)
    return results


def _check_options(recipe: Policy, loss: Loss | None, cache: Any) -> None:
    if cache is not None and not isinstance(cache, str | Path):
        raise OutputError(f"cache must be the path of a folder, or None, got {cache!r:.80}")
    if cache is not None and (recipe.allocation or recipe.reconstruction):
        check_writable(Path(cache))
    samples = recipe.samples
    if loss is not None:
        check_callable(loss)
    if loss is not None and (samples is None or samples.metric not in GRADIENT_METRICS):
        raise PolicyError(
            f"loss was given, and policy {recipe.name!r} takes no gradient: give it a search whose "
            f"metric is {' or '.join(GRADIENT_METRICS)}, or leave loss out"
        )


def _shown(
    images: CalibrationImages, label: str, progress: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    return track(images.with_labels(), label=label, total=len(images), enabled=progress)


def _choose_smoothing(
    gm: fx.GraphModule, images: CalibrationImages, recipe: Policy, loss: Loss | None, progress: bool
) -> FoldDecisions:
    assert recipe.samples is not None
    batches = _shown(images, "sample", progress)
    return choose_smoothing(gm, batches, recipe.samples, loss, progress=progress)


class _Clock:
    """Wall time by phase, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def _report(
    gm: fx.GraphModule,
    original: FloatModel,
    recipe: Policy,
    results: dict[str, PassResult],
    seen: int,
    clock: _Clock,
    outcome: AllocationResult | None,
) -> Report:
    reasons = {skip.site: skip.reason for skip in results["AssignSpecs"].skips}
    sqnr, output_sqnr = measure_sqnr(gm, original.images, original.outputs)
    clock.lap("report")
    return Report(
        policy=recipe.name,
        plan=make_plan(gm, reasons),
        sqnr=sqnr,
        output_sqnr=output_sqnr,
        images=seen,
        float_bytes=original.bytes,
        quantized_bytes=quantized_bytes(gm),
        seconds=clock.seconds,
        allocation=outcome,
        changes={name: result.changed for name, result in results.items()},
        gains=tuple(
            (name, gain.site, gain.choice, gain.measure, gain.ratio)
            for name, result in results.items()
            for gain in result.gains
        ),
        notes=tuple(
            (name, skip.site, skip.reason)
            for name, result in results.items()
            for skip in result.skips
        ),
    )
