"""Images and labels from the batches of a user's loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import BatchError, EmptyLoaderError, NonFiniteError

# Keys of the image tensor in the dicts of common data sets and processors.
IMAGE_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x", "img")
LABEL_KEYS = ("labels", "label", "target", "targets", "y")


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Splits a batch into images and labels.

    Args:
        batch: a tensor ``(B, …)``; a pair ``(images, labels)``, or a longer sequence that begins
            with images and labels; or a mapping with one of the keys in ``IMAGE_KEYS``.

    Returns:
        Float images ``(B, …)``, and labels as a tensor ``(B, …)`` of any type, or None.

    Raises:
        BatchError: no float tensor with a batch dimension is found.
    """
    images, labels = _images_and_labels(batch)
    if not isinstance(images, Tensor):
        raise BatchError(
            f"a calibration batch must be a tensor, (images, labels) or a dict with one of "
            f"{', '.join(IMAGE_KEYS)}; got {_describe(batch)}",
            got=batch,
            expected=Tensor,
        )
    if not images.is_floating_point():
        raise BatchError(
            f"images must be float tensors, as the model's input is, got {images.dtype}; "
            "convert and normalise them first (for example torchvision's ToTensor, Normalize)",
            got=images.dtype,
            expected=torch.float32,
        )
    if images.dtype is torch.float64:
        raise BatchError(
            "images are float64, the model takes float32; call images.float()",
            got=images.dtype,
            expected=torch.float32,
        )
    if images.ndim < 2 or images.shape[0] == 0:
        raise BatchError(
            f"images must be (B, …) with B >= 1, got shape {tuple(images.shape)}; "
            "add a batch dimension with images.unsqueeze(0) or use a DataLoader",
            got=tuple(images.shape),
            expected="(B, …) with B >= 1",
        )
    return images, _as_labels(labels, len(images))


def _as_labels(labels: Any, count: int) -> Tensor | None:
    """A copy of the labels, ``(count, …)``; None where labels are not ``count`` numbers."""
    if labels is None or isinstance(labels, str | bytes | Mapping):
        return None
    try:
        copied = torch.as_tensor(labels).clone()
    except (TypeError, ValueError, RuntimeError):
        return None
    return copied if copied.ndim and len(copied) == count else None


def _images_and_labels(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in IMAGE_KEYS if key in batch), None)
        return images, next((batch[key] for key in LABEL_KEYS if key in batch), None)
    if isinstance(batch, list | tuple) and batch:
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with keys {sorted(map(str, batch))}"
    if isinstance(batch, list | tuple):
        return f"{type(batch).__name__} of {[type(item).__name__ for item in batch]}"
    return type(batch).__name__


def _read_twice(loader: Iterable[Any]) -> BatchError:
    return BatchError(
        "this policy reads the calibration data more than once, and calib_loader can be read only "
        "once; pass a list or a DataLoader instead of a generator",
        got=loader,
        expected="an iterable that can be read again",
    )


class CalibrationImages:
    """The checked images of a loader, one batch at a time; at most two batches are in memory.

    The first batch is read on construction, since capture needs its shape. A loader that can be
    iterated again (a list, a DataLoader) can be used for several passes, a generator for only one.

    Args:
        loader: any iterable of batches (see :func:`split_batch`).
        twice: whether the images will be read more than once.

    Raises:
        BatchError: the loader is a bare tensor or not iterable; or it can be read only once and
            will be read twice; or its first batch is unusable.
        EmptyLoaderError: the loader yields no batch.
    """

    def __init__(self, loader: Iterable[Any], *, twice: bool = False) -> None:
        if isinstance(loader, Tensor) and loader.ndim >= 4:
            loader = [loader]
        if isinstance(loader, Tensor | str | bytes | Mapping) or not isinstance(loader, Iterable):
            raise BatchError(
                f"calib_loader must be an iterable of batches, got {_describe(loader)}; "
                "wrap a single batch in a list: compile(model, [images])",
                got=loader,
                expected="an iterable of batches",
            )
        self._loader = loader
        self._iterator = iter(loader)
        self._rereadable = self._iterator is not loader
        if twice and not self._rereadable:
            raise _read_twice(loader)
        try:
            batch = next(self._iterator)
        except StopIteration as end:
            raise EmptyLoaderError(
                "calib_loader gave no batch; give at least one batch of images "
                "(32 images are usual). A generator that was read before is empty"
            ) from end
        self.first, self._first_labels = self._checked(batch, None)
        self._fresh = True

    def __len__(self) -> int:
        """Number of batches, 0 where the loader has no length."""
        try:
            return len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            return 0

    def __iter__(self) -> Iterator[Tensor]:
        """Yields the images of each batch, ``(B, …)`` each; raises as :meth:`with_labels`."""
        return (images for images, _ in self.with_labels())

    def with_labels(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields images ``(B, …)`` and labels of each batch, None for a batch without labels.

        Raises:
            BatchError: a batch is unusable, or its image shape or dtype differs from the first
                batch's, or a one-shot iterator is read again.
            EmptyLoaderError: the loader yields no batch when it is read again.
            NonFiniteError: an image holds NaN or infinity.
        """
        if self._fresh:
            self._fresh = False
            yield self.first, self._first_labels
            batches, start = self._iterator, 1
        elif self._rereadable:
            batches, start = self._reread(), 0
        else:
            raise _read_twice(self._loader)
        for number, batch in enumerate(batches, start):
            yield self._checked(batch, self.first, number)

    def _reread(self) -> Iterator[Any]:
        """Reads the batches of the loader again.

        Raises:
            EmptyLoaderError: the loader yields no batch.
        """
        empty = True
        for batch in self._loader:
            empty = False
            yield batch
        if empty:
            raise EmptyLoaderError(
                "this policy reads the calibration data more than once, and calib_loader gave no "
                "batch when it was read again: its __iter__ must begin with the first batch each "
                "time, as that of a list or a DataLoader does"
            )

    @staticmethod
    def _checked(batch: Any, first: Tensor | None, number: int = 0) -> tuple[Tensor, Tensor | None]:
        images, labels = split_batch(batch)
        if first is not None and images.shape[1:] != first.shape[1:]:
            raise BatchError(
                f"a batch has images of shape {tuple(images.shape[1:])}, the first batch "
                f"{tuple(first.shape[1:])}; resize all images to the model's input size",
                got=tuple(images.shape[1:]),
                expected=tuple(first.shape[1:]),
            )
        if first is not None and images.dtype != first.dtype:
            raise BatchError(
                f"a batch has images of type {images.dtype}, the first batch {first.dtype}; give "
                f"all images one type, for example by images.to({first.dtype})",
                got=images.dtype,
                expected=first.dtype,
            )
        finite = torch.isfinite(images).flatten(1).all(1)
        if not bool(finite.all()):
            raise NonFiniteError(
                f"NaN or infinity in image {int((~finite).nonzero()[0])} of calibration batch "
                f"{number}, both counted from 0; look for a division by zero in the normalisation "
                "or a corrupt file"
            )
        return images, labels
