"""The runner of passes: checks each pass against its contract, and keeps results and times."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, fx, nn

from fxquant.errors import FxQuantError, PassError
from fxquant.graph.capture import capture
from fxquant.graph.meta import KEYS, STAGE
from fxquant.graph.nodes import stage
from fxquant.graph.verify import verify
from fxquant.passes.base import Comparison, Note, Pass, PassResult
from fxquant.utils.progress import track, working

# Called with the name of a pass and the graph that it left.
OnPass = Callable[[str, fx.GraphModule], object]
T = TypeVar("T")


class Pipeline:
    """A graph on its way through the passes.

    Args:
        gm: the graph, edited in place.
        progress: show the progress of long steps on stderr.
        on_pass: called with the name of each pass that has run, and the graph.

    Attributes:
        gm: the graph.
        progress: whether progress is shown; long passes have an option of this name.
        results: result of each pass that has run, in order, by class name; of two passes of one
            class the last result is kept.
        seconds: phase -> wall time so far.
    """

    def __init__(
        self, gm: fx.GraphModule, progress: bool = False, on_pass: OnPass | None = None
    ) -> None:
        self.gm, self.progress, self._on_pass = gm, progress, on_pass
        self.results: dict[str, PassResult] = {}
        self.seconds: dict[str, float] = {}

    @classmethod
    def capture(
        cls, model: nn.Module, images: Tensor, progress: bool = False, on_pass: OnPass | None = None
    ) -> Pipeline:
        """A pipeline on the captured graph of a model; its first phase is ``capture``.

        Args:
            model: in eval mode; not changed.
            images: a batch ``(B, …)``.
            progress: as for the class.
            on_pass: as for the class.

        Raises:
            CaptureError: the model cannot be captured.
        """
        start = time.perf_counter()
        with working("capture", enabled=progress):
            pipeline = cls(capture(model, images), progress, on_pass)
        pipeline.seconds["capture"] = time.perf_counter() - start
        return pipeline

    def apply(self, item: Pass, phase: str | None = None) -> PassResult:
        """Runs a pass, then lints, recompiles and verifies the graph.

        Args:
            item: the pass.
            phase: phase that the pass's time is added to; None inside a :meth:`phase`.

        Raises:
            PassError: the pass requires another stage than the graph is in, or fails; or the
                callback raises an error or changes the graph.
            VerifyError: the pass broke the graph.
        """
        if phase is not None:
            with self.phase(phase):
                return self.apply(item)
        name = type(item).__name__
        result = _run(item, self.gm, self.results)
        self.record(name, result)
        if self._on_pass is not None:
            _call_back(self._on_pass, name, self.gm)
        return self.results[name]

    def record(self, step: str, result: PassResult) -> None:
        """Keeps the result of a step, and writes the step's name into its notes and comparisons."""
        self.results[step] = replace(
            result,
            notes=tuple(replace(note, step=step) for note in result.notes),
            comparisons=tuple(replace(item, step=step) for item in result.comparisons),
        )

    def trial(self) -> Pipeline:
        """A pipeline on a copy of the graph that shares the parameters, to try passes on.

        It shows no progress and calls nothing back.
        """
        gm = fx.GraphModule(self.gm, copy.deepcopy(self.gm.graph))
        gm.meta = dict(self.gm.meta)
        pipeline = Pipeline(gm)
        pipeline.results = dict(self.results)
        return pipeline

    @contextmanager
    def phase(self, name: str, *, shown: bool = False) -> Iterator[None]:
        """Adds the wall time of its body to ``seconds[name]``.

        Args:
            name: name of the phase.
            shown: show the phase's name while it runs, for steps without progress of their own.
        """
        start = time.perf_counter()
        try:
            with working(name, enabled=shown and self.progress):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """The items, with the progress through them on stderr where it is shown.

        Args:
            items: the items of the step.
            label: name of the step.
            total: number of items.
        """
        return track(items, label=label, total=total, enabled=self.progress)

    @property
    def notes(self) -> tuple[Note, ...]:
        """The notes of all steps, in order."""
        return tuple(note for result in self.results.values() for note in result.notes)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The comparisons of all steps, in order."""
        return tuple(item for result in self.results.values() for item in result.comparisons)


def _run(item: Pass, gm: fx.GraphModule, before: Iterable[str]) -> PassResult:
    """Runs a pass; its errors list the names of the steps before it."""
    name, already = type(item).__name__, ", ".join(before) or "none"
    if stage(gm) is not item.requires:
        raise PassError(
            f"{name} requires a graph in stage {item.requires.name}, got {stage(gm).name}; "
            f"already run: {already}",
            got=stage(gm),
            expected=item.requires,
        )
    try:
        result = item.run(gm)
        STAGE.set(gm, item.ensures)
        gm.graph.lint()
    except FxQuantError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise PassError(
            f"{name} failed ({type(error).__name__}: {error}); already run before it: "
            f"{already}. Please report this with the model's definition"
        ) from error
    gm.recompile()
    verify(gm)
    return result


def _call_back(on_pass: OnPass, name: str, gm: fx.GraphModule) -> None:
    """Calls the user's callback; its errors, and the error for an edit, name the pass."""
    before = _state(gm)
    try:
        on_pass(name, gm)
    except Exception as error:  # the user's code may raise anything
        raise PassError(
            f"on_pass raised {type(error).__name__} when it was called after {name}: {error}"
        ) from error
    if _state(gm) != before:
        raise PassError(
            f"on_pass changed the graph when it was called after {name}; it may only read the "
            "graph. Edit or run a copy (copy.deepcopy(gm)): a run feeds the observers"
        )


def _state(gm: fx.GraphModule) -> tuple[object, ...]:
    """The graph's nodes, annotations and tensors; of tensors the identity and count of edits."""
    nodes = [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in gm.graph.nodes]
    owners = (gm, *gm.graph.nodes)
    annotations = [{key.name: key.get(owner) for key in KEYS} for owner in owners]
    values = {
        f"{path}.{name}": value
        for path, module in gm.named_modules()
        for name, value in (
            *vars(module).items(),
            *module._parameters.items(),
            *module._buffers.items(),
        )
        if isinstance(value, Tensor)
    }
    tensors = {
        name: (id(value), 0 if value.is_inference() else value._version)
        for name, value in values.items()
    }
    return nodes, annotations, tensors


def run_passes(gm: fx.GraphModule, passes: Iterable[Pass]) -> dict[str, PassResult]:
    """Runs passes in order on a graph, as a :class:`Pipeline` does.

    Args:
        gm: edited in place.
        passes: in order; of two passes of one class in one call the last result is returned.

    Returns:
        Result of each pass, by class name.

    Raises:
        PassError: a pass requires another stage than the graph is in, or fails.
        VerifyError: a pass broke the graph.
    """
    pipeline = Pipeline(gm)
    for item in passes:
        pipeline.apply(item)
    return pipeline.results
