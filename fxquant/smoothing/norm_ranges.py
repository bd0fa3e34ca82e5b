"""Ranges of the channels that each norm yields, over the calibration images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibration.input_errors import errors_as_input_error
from fxquant.config.spec import Granularity, TensorSpec
from fxquant.config.vocabulary import Stage
from fxquant.errors import PassError
from fxquant.graph.capture import device_of
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.graph.nodes import module_path, operand, stage
from fxquant.observers.observer import MinMaxObserver
from fxquant.smoothing.fold_sites import Site, norm_sites


def norm_ranges(gm: fx.GraphModule, batches: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Measures the range of each channel of the values that linears read from a norm.

    Values that no linear reads do not count: behind the last norm, a classifier may read the class
    token alone.

    Args:
        gm: in stage FLOAT, not changed.
        batches: images ``(B, …)`` each, moved to the device of the graph.

    Returns:
        ``(lo, hi)`` by name of the norm, each ``(C,)`` on the graph's device, for every norm that
        `affine_fold` can fold into linears.

    Raises:
        BatchError: the model does not run on the images.
        CalibrationError: there are no images.
        NonFiniteError: an output of a norm holds NaN or infinity.
        PassError: the graph is in another stage.
    """
    if stage(gm) is not Stage.FLOAT:
        raise PassError(
            f"norm_ranges takes stage FLOAT, got {stage(gm).name}",
            got=stage(gm),
            expected=Stage.FLOAT,
        )
    sites = [site for _, site in norm_sites(gm) if isinstance(site, Site)]
    recorder, device = _Recorder(gm, sites), device_of(gm)
    with torch.no_grad():
        for images in batches if sites else ():
            with errors_as_input_error(images):
                recorder.run(images.to(device))
    return {name: observer.range() for name, observer in recorder.observers.items()}


class _Recorder(GraphInterpreter):
    """Runs a graph; one observer for each site records the inputs of the site's linears."""

    def __init__(self, gm: fx.GraphModule, sites: Iterable[Site]) -> None:
        super().__init__(gm)
        self.observers: dict[str, MinMaxObserver] = {}
        self._observed: dict[fx.Node, MinMaxObserver] = {}
        spec = TensorSpec(granularity=Granularity.CHANNEL)
        for site in sites:
            where = module_path(site.source) or site.source.name
            observer = MinMaxObserver(spec, axis=-1, where=where)
            self.observers[site.source.name] = observer
            self._observed |= {operand(linear, 0): observer for linear in site.linears}

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        value = super().run_node(n)
        if n in self._observed:
            self._observed[n](value)
        return value
