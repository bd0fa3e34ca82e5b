"""Signs that calibration images are not the images that the model will see."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.utils.notes import Note, NoteKind

# Fewer images, or images with fewer pixels on a side, say too little.
_FEWEST_IMAGES, _LEAST_SIDE = 4, 16
# Neighbouring pixels of photographs and drawings correlate by 0.8 and more, those of noise by 0.
_NOISE_CORRELATION = 0.2
# Normalised images lie within a few units of zero; values of bytes reach 255.
_LARGEST_NORMALISED = 16.0
# Largest difference of two images, as a share of their spread, that counts as none.
_SAME_IMAGE = 1e-3


@torch.no_grad()
def image_notes(images: Tensor) -> tuple[Note, ...]:
    """Notes on images that look unlike photographs or drawings, normalised for a network.

    Ranges that are fitted to noise, to constants or to one image do not fit the images of the
    deployed model; the compilation goes on all the same.

    Args:
        images: some calibration images, ``(B, C, H, W)``; other shapes, and too few or too small
            images, have no notes.
    """
    if images.ndim != 4 or len(images) < _FEWEST_IMAGES or min(images.shape[2:]) < _LEAST_SIDE:
        return ()
    values = images.detach().float().cpu()
    spreads = values.flatten(1).std(1)
    reasons = []
    constant = int((spreads < 1e-6).sum())
    if constant:
        reasons.append(f"{constant} of the first {len(values)} are constant")
    elif bool(((values - values[:1]).abs().amax((1, 2, 3)) < _SAME_IMAGE * spreads).all()):
        reasons.append(f"the first {len(values)} are all alike")
    elif float(_neighbour_correlation(values).median()) < _NOISE_CORRELATION:
        reasons.append("they look like noise: neighbouring pixels do not correlate")
    largest = float(values.abs().max())
    if largest > _LARGEST_NORMALISED:
        reasons.append(
            f"values reach {largest:.0f}: normalise them as for training, unless the model does"
        )
    return tuple(
        Note(NoteKind.MODEL, "calibration images", f"{reason}; ranges may not fit real images")
        for reason in reasons
    )


def _neighbour_correlation(images: Tensor) -> Tensor:
    """Correlation of horizontal neighbours in each image, ``(B,)``."""
    left, right = images[..., :-1].flatten(2), images[..., 1:].flatten(2)
    left = left - left.mean(2, keepdim=True)
    right = right - right.mean(2, keepdim=True)
    covariance = (left * right).sum((1, 2))
    variances = left.square().sum((1, 2)) * right.square().sum((1, 2))
    return covariance / variances.sqrt().clamp(min=1e-12)
