"""Brings a captured graph to the canonical dialect, and checks that its function is unchanged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxquant.calibration.image_notes import image_notes
from fxquant.errors import BatchError, CaptureError, NonFiniteError, PassError
from fxquant.graph.capture import device_of
from fxquant.graph.meta import HOOKED_MODULES
from fxquant.graph.outputs import float_outputs
from fxquant.graph.parameter_bytes import float_bytes
from fxquant.passes import (
    CanonicalizeDataMovement,
    DropNoOps,
    FoldBatchNorm,
    FoldConstants,
    NameNodes,
    Note,
    NoteKind,
    OpenEinsum,
    Pass,
    PassResult,
    Pipeline,
    ScaleAfterMatmul,
    SplitAttention,
    SplitProjections,
    ToLinear,
)

# Each pass relies on the passes before it: data movement has one name each; attention and einsum
# are split before products become linears; transposed weights are folded before a product with a
# constant can be recognized; batch norm is folded before the weight of a projection is split.
CANONICAL: tuple[Pass, ...] = (
    CanonicalizeDataMovement(),
    DropNoOps(),
    SplitAttention(),
    OpenEinsum(),
    FoldConstants(),
    ToLinear(),
    FoldBatchNorm(),
    ScaleAfterMatmul(),
    SplitProjections(),
    NameNodes(),
)
HOOKS_NOTE = "its hooks are not in the compiled model; what they change is missing there"
MIXES_NOTE = (
    "the outputs of an image depend on the other images of its batch: a layer may take the batch "
    "for another axis, as nn.MultiheadAttention does without batch_first=True"
)
ALONE_NOTE = "it does not run on one image alone, for batches of two or more only"
# Largest difference between outputs of the same function, computed in another order, over the
# largest output.
_MAX_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class FloatModel:
    """Outputs and size of the float model, with which the report compares the quantized one.

    Attributes:
        images: a few images, on the device of the graph.
        outputs: the float tensors among the model's outputs for the images.
        bytes: bytes of the model's parameters.
    """

    images: Tensor
    outputs: list[Tensor]
    bytes: int


@torch.no_grad()
def canonicalize(pipeline: Pipeline, images: Tensor) -> FloatModel:
    """Runs the passes, and checks that the function stays the same.

    Notes on the model and the images are recorded as those of step ``capture``, whose
    phase all this is in.

    Args:
        pipeline: with a graph as captured, in stage FLOAT.
        images: a few, ``(B, …)``, on any device.

    Returns:
        The images on the graph's device with the float outputs, for the report.

    Raises:
        BatchError: the model does not run on the images.
        CaptureError: a second run on the same images has other outputs.
        NonFiniteError: an output is NaN.
        PassError: a pass changed the function.
    """
    gm = pipeline.gm
    with pipeline.phase("capture", shown=True):
        images = images.to(device_of(gm))
        before, again = _outputs(gm, images), _outputs(gm, images)
        if any(bool(value.isnan().any()) for value in before):
            raise NonFiniteError(
                "the float model itself outputs NaN for the first calibration images: check its "
                "weights and the image normalisation"
            )
        if any(not torch.equal(old, new) for old, new in zip(before, again, strict=True)):
            raise CaptureError(
                "the model gives other outputs when run again: it draws random numbers or changes "
                "a buffer in eval mode, which cannot be compiled: turn that off"
            )
        notes = [Note(NoteKind.MODEL, path, HOOKS_NOTE) for path in HOOKED_MODULES.get(gm) or ()]
        notes += [Note(NoteKind.MODEL, "model", r) for r in _notes_of_batches(gm, images, before)]
        notes += image_notes(images)
        pipeline.record("capture", PassResult(0, tuple(notes)))
        for item in CANONICAL:
            pipeline.apply(item)
        for old, new in zip(before, _outputs(gm, images), strict=True):
            error = _difference(old, new)
            if not error < _MAX_DIFFERENCE:
                raise PassError(
                    f"the canonical graph differs from the captured one by {error:.1e} of its "
                    "largest output. This is a bug; please report it with the model's definition",
                    got=error,
                    expected=f"< {_MAX_DIFFERENCE:g}",
                )
    return FloatModel(images, before, float_bytes(gm))


def _notes_of_batches(gm: fx.GraphModule, images: Tensor, together: list[Tensor]) -> list[str]:
    """Notes on how outputs of the first image alone differ from its outputs in the batch."""
    if len(images) == 1:
        return []
    try:
        alone = _outputs(gm, images[:1])
    except BatchError:
        return [ALONE_NOTE]
    mixes = any(
        old[:1].shape == new.shape and not _difference(old[:1], new) < _MAX_DIFFERENCE
        for old, new in zip(together, alone, strict=True)
        if old.ndim and len(old) == len(images)
    )
    return [MIXES_NOTE] if mixes else []


def _outputs(gm: fx.GraphModule, images: Tensor) -> list[Tensor]:
    """The float tensors among the outputs.

    Raises:
        BatchError: the model does not run on the images.
    """
    try:
        return float_outputs(gm(images))
    except (RuntimeError, TypeError, IndexError) as error:
        raise BatchError(
            f"the model does not take images of shape {tuple(images.shape)} and type "
            f"{images.dtype} ({error})",
            got=tuple(images.shape),
        ) from error


def _difference(old: Tensor, new: Tensor) -> float:
    """Largest difference over the largest old value; equal infinities count as equal."""
    if not old.numel():
        return 0.0
    gap = torch.where(old == new, 0.0, (old - new).abs())
    size = torch.where(old.isinf(), 0.0, old.abs())
    return float(gap.max() / size.max().clamp(min=1e-6))
