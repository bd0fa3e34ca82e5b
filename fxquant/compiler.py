"""``compile()``: the steps of the pipeline in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.calibration.loader import CalibrationImages
from fxquant.calibration.observe import observe
from fxquant.calibration.product_noise import product_noise
from fxquant.calibration.user_loss import Loss, check_callable
from fxquant.compiled.model import CompiledModel
from fxquant.compiled.output_errors import compare_outputs
from fxquant.compiled.report import Report, make_plan, measure_quantizers, sqnr_of
from fxquant.config.scale_search import GRADIENT_METRICS
from fxquant.config.spec import Granularity, ObserverKind
from fxquant.config.validation import check_flags
from fxquant.errors import OutputError, PassError, PolicyError
from fxquant.graph.capture import device_of
from fxquant.graph.check_model import check_model
from fxquant.graph.embeddings import has_logits
from fxquant.graph.meta import EMBEDDINGS
from fxquant.graph.parameter_bytes import quantized_bytes
from fxquant.mixed_precision.allocate.result import AllocationResult
from fxquant.mixed_precision.choose import check_budget, choose_widths, reservoir_for
from fxquant.passes import (
    AllocateBits,
    AssignSpecs,
    AttachLowRank,
    CentreHeads,
    Compensate,
    CorrectBias,
    DeferSoftmax,
    Freeze,
    InsertObservers,
    MarkEmbeddings,
    Pipeline,
    QuantizeBias,
    Reconstruct,
    Reparameterize,
    RotateHeads,
    RotateHidden,
    RotateResidual,
    SearchScales,
    SmoothWithBias,
)
from fxquant.passes.base import Pass, PassResult, skipped
from fxquant.passes.canonical.canonicalize import FloatModel, canonicalize
from fxquant.passes.centre_heads import head_ranges
from fxquant.passes.pipeline import OnPass
from fxquant.policies.policy import Policy, Rule
from fxquant.policies.policy_file import policy_to_dict, resolve
from fxquant.quantizers import has_uniform_grid
from fxquant.reconstruction.blockwise import BlockwiseRunner, all_images
from fxquant.reconstruction.image_split import split_images
from fxquant.smoothing.channel_ranges import norm_ranges
from fxquant.smoothing.choose import choose_smoothing
from fxquant.utils.files import check_writable

# Images that the canonical graph is compared on, and that the report's SQNR is measured on.
_REPORT_IMAGES = 8
# Images of a trial of rotations.
_TRIAL_IMAGES = 8
# Largest noise of products with a rotation over the noise without, for a rotation to be made. A
# search of scales makes up for smaller gains; rotation behind activation functions takes run time.
_MAX_NOISE, _MAX_NOISE_AT_A_COST = 0.85, 0.75


@torch.inference_mode(mode=False)  # inference tensors have no gradients, which a search may need
def compile(
    model: nn.Module,
    calib_loader: Iterable[Any],
    policy: str | Path | Policy | Mapping[str, Any] = "w8a8",
    *,
    loss: Loss | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
    on_pass: OnPass | None = None,
) -> CompiledModel:
    """Quantizes a vision transformer after training.

    Args:
        model: a model in eval mode whose input is a float tensor ``(B, C, H, W)``; not changed.
        calib_loader: batches: tensors, ``(images, labels)`` pairs, dicts, or a DataLoader of these;
            32 images are usual. Pass no generator where ``Policy.reads_images_twice`` is true.
        policy: preset name, Policy, dict, or path of a YAML file.
        loss: the sum over up to four images of a loss of outputs and labels (or None); its gradient
            weights errors. Smoothing and allocation always measure the divergence from float.
        cache: folder for measured losses and trained blocks; an interrupted run continues where it
            stopped, given the same threads, device, and images in the same order.
        progress: show the progress of long steps on stderr.
        on_pass: called with the name of each pass and the graph after it, which it may only read.

    Raises:
        CaptureError: the model cannot be captured, or holds nothing to quantize.
        PolicyError: the policy or an option is malformed, or the policy does not fit the model.
        CalibrationError: calibration data or loss cannot be used, or the model gives NaN.
        OutputError: the cache is not a path, or cannot be written.
        PassError: a pass fails; or ``on_pass`` cannot be called, raises or changes the graph.
    """
    recipe = _checked_recipe(model, policy, loss, cache, progress, on_pass)
    images = CalibrationImages(calib_loader, twice=recipe.reads_images_twice)
    run = Pipeline.capture(model, images.first, progress, on_pass)
    float_model = canonicalize(run, images.first[:_REPORT_IMAGES])
    run.apply(MarkEmbeddings(compared=recipe.compares_outputs), "capture")
    saved_policy = policy_to_dict(recipe)
    recipe = recipe.for_outputs(logits=has_logits(run.gm))
    _change_float(run, recipe, images)
    run.apply(AssignSpecs(recipe.rules), "capture")
    if recipe.allocation is not None:  # a budget that cannot be met is refused before long work
        trial = run.trial()
        trial.apply(InsertObservers())
        check_budget(trial.gm, recipe)
    if recipe.smooth and recipe.samples is not None:
        with run.phase("smooth"):
            batches = run.track(images.with_labels(), "sample", len(images))
            folds = choose_smoothing(run.gm, batches, recipe.samples, loss, progress=progress)
            run.apply(SmoothWithBias(folds))
    with run.phase("calibrate"):
        run.apply(InsertObservers(histograms=recipe.allocation is not None))
        reservoir = reservoir_for(run.gm, recipe.allocation)
        batches = run.track(images.with_labels(), "calibrate", len(images))
        samples = folds.samples if recipe.smooth else None  # folded with the channels
        seen = observe(run.gm, batches, recipe.samples, loss, reservoir, samples)
    allocation = None
    if recipe.allocation is not None:
        with run.phase("allocate"):
            widths, allocation = choose_widths(run.gm, reservoir, seen, recipe, cache, progress)
            run.apply(AllocateBits(widths))
    run.apply(Freeze(), "fit")
    if recipe.search is not None:
        run.apply(SearchScales(seen.samples, recipe.search, progress), "search")
    if recipe.recovers:  # towards the float network as it is before biases are corrected
        runner = BlockwiseRunner(run.gm, all_images(images), progress=progress)
        split = split_images(len(runner.images), recipe.reconstruction)
    if recipe.bias_correction:
        run.apply(CorrectBias(seen.samples), "fit")
    if recipe.low_rank is not None:
        run.apply(AttachLowRank(seen.samples, recipe.low_rank), "branches")
    if recipe.compensation is not None:
        run.apply(Compensate(runner, recipe.compensation, split), "compensate")
    if recipe.reconstruction is not None:
        run.apply(Reconstruct(runner, recipe.reconstruction, split, cache), "reconstruct")
    run.apply(QuantizeBias(), "fit")
    report = _report(run, recipe, float_model, seen.images, allocation)
    return CompiledModel(run.gm, report, saved_policy, tuple(images.first.shape[1:]))


def _checked_recipe(
    model: nn.Module, policy: Any, loss: Loss | None, cache: Any, progress: Any, on_pass: Any
) -> Policy:
    """The policy, after checks of all arguments."""
    recipe = resolve(policy)
    check_flags(progress=progress)
    if on_pass is not None and not callable(on_pass):
        raise PassError(
            "on_pass must be a function that is called with the name of a pass and the graph, got "
            f"{on_pass!r:.80}",
            got=on_pass,
            expected="a function",
        )
    if cache is not None and not isinstance(cache, str | Path):
        raise OutputError(
            f"cache must be the path of a folder, or None, got {cache!r:.80}",
            got=cache,
            expected=(str, Path, None),
        )
    if cache is not None and (recipe.allocation or recipe.trains):
        check_writable(Path(cache))
    samples = recipe.samples
    if loss is not None:
        check_callable(loss)
    if loss is not None and (samples is None or samples.metric not in GRADIENT_METRICS):
        raise PolicyError(
            f"policy {recipe.name!r} uses no gradient of the given loss: give the policy a search "
            f"whose metric is {' or '.join(GRADIENT_METRICS)}, or do not pass a loss",
            got=None if samples is None else samples.metric,
            expected=GRADIENT_METRICS,
        )
    check_model(model)
    return recipe


def _change_float(run: Pipeline, recipe: Policy, images: CalibrationImages) -> None:
    """Changes the network for quantization without changing its function, as the policy asks."""
    if recipe.rotate or recipe.rotate_hidden:  # before folds of channels, which rotations would mix
        with run.phase("rotate", shown=True):
            _rotate(run, recipe, images.first)
    if recipe.centre_heads:
        with run.phase("centre"):
            run.apply(CentreHeads(head_ranges(run.gm, [images.first])))
    if recipe.reparameterize:
        with run.phase("reparameterize"):
            ranges = norm_ranges(run.gm, run.track(images, "ranges", len(images)))
            run.apply(Reparameterize(ranges))
    if recipe.defer_softmax:
        run.apply(DeferSoftmax(), "capture")


def _rotate(run: Pipeline, recipe: Policy, images: Tensor) -> None:
    """Makes rotations; where the policy asks for trials, those that lower the noise of products."""
    rotations: list[tuple[float, tuple[Pass, ...]]] = []
    if recipe.rotate:
        rotations.append((_MAX_NOISE, (RotateResidual(), RotateHeads())))
    if recipe.rotate_hidden:
        rotations.append((_MAX_NOISE_AT_A_COST, (RotateHidden(),)))
    noise = _trial_noise(run, recipe, images) if recipe.trial_rotations else 0.0
    for max_ratio, passes in rotations:
        noise_after = _trial_noise(run, recipe, images, passes) if recipe.trial_rotations else 0.0
        if noise_after <= max_ratio * noise:
            noise = noise_after
            for item in passes:
                run.apply(item)
            continue
        reason = (
            f"not rotated: the noise of products would be {noise_after / max(noise, 1e-30):.2f} of "
            f"that without, and {max_ratio} is asked for"
        )
        for item in passes:
            run.record(type(item).__name__, PassResult(0, (skipped("network", reason),)))


def _trial_noise(
    run: Pipeline, recipe: Policy, images: Tensor, rotations: tuple[Pass, ...] = ()
) -> float:
    """The noise of products of a copy that is rotated and quantized on trial.

    Ranges of activations are those of least squared error where the policy has min-max ranges,
    since searches and training, which follow, clip too; a range a channel would take long.
    """
    trial, images = run.trial(), images[:_TRIAL_IMAGES]
    for item in rotations:
        trial.apply(item)
    if recipe.centre_heads:
        trial.apply(CentreHeads(head_ranges(trial.gm, [images])))
    if recipe.defer_softmax:
        trial.apply(DeferSoftmax())
    trial.apply(AssignSpecs(tuple(map(_with_fitted_range, recipe.rules))))
    trial.apply(InsertObservers())
    observe(trial.gm, [(images, None)])
    trial.apply(Freeze())
    return product_noise(trial.gm, images.to(device_of(trial.gm)))


def _with_fitted_range(rule: Rule) -> Rule:
    spec = rule.spec
    if spec is None or spec.observer is not ObserverKind.MINMAX or not has_uniform_grid(spec):
        return rule
    if spec.granularity is Granularity.CHANNEL:
        return rule
    return replace(rule, spec=replace(spec, observer=ObserverKind.MSE))


def _report(
    run: Pipeline,
    recipe: Policy,
    float_model: FloatModel,
    images: int,
    allocation: AllocationResult | None,
) -> Report:
    """The record of a compilation, with the measured quantization noise."""
    with run.phase("report"):
        plan = make_plan(run.gm, run.notes)
        sqnr, outputs = measure_quantizers(run.gm, float_model.images)
        embeddings = EMBEDDINGS.get(run.gm) or ()
    return Report(
        policy=recipe.name,
        plan=plan,
        sqnr=sqnr,
        output_sqnr=sqnr_of(float_model.outputs, outputs),
        outputs=compare_outputs(float_model.outputs, outputs, embeddings),
        images=images,
        float_bytes=float_model.bytes,
        quantized_bytes=quantized_bytes(run.gm),
        seconds=run.seconds,
        allocation=allocation,
        changes={name: result.changed for name, result in run.results.items()},
        notes=run.notes,
        comparisons=run.comparisons,
    )
