"""Observers: statistics of a tensor over the calibration images, and the quantizer fitted to it."""

from fxquant.observers.observer import (
    HistogramObserver,
    MinMaxObserver,
    Observer,
    SoftmaxObserver,
    make_observer,
)

__all__ = [
    "HistogramObserver",
    "MinMaxObserver",
    "Observer",
    "SoftmaxObserver",
    "make_observer",
]
