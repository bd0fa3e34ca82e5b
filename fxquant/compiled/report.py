"""Report of a compilation: the decision for each edge, and the noise of its quantizer."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from fxquant.compiled.output_errors import OutputError, OutputKind, decibels
from fxquant.config.spec import Granularity, ObserverKind, Scheme, TensorSpec
from fxquant.graph.edges import edges, fed_by
from fxquant.graph.nodes import submodule
from fxquant.graph.outputs import float_outputs
from fxquant.mixed_precision.allocate.result import AllocationResult
from fxquant.quantizers import FAMILIES, Quantizer
from fxquant.utils.notes import Comparison, Note, NoteKind


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """The decision for one edge.

    Attributes:
        edge: unique name of the edge.
        path: module path of the consuming operation.
        op: kind of the operation.
        arg: role of the edge in the operation.
        fed_by: producer of the edge's values.
        spec: the spec of the edge; None if the edge stays float.
        quantizer: name of the quantizer module; edges that share a value share the quantizer.
        reason: the reason why the edge stays float or differs from its rule; empty otherwise.
    """

    edge: str
    path: str
    op: str
    arg: str
    fed_by: str
    spec: TensorSpec | None
    quantizer: str | None
    reason: str = ""


def make_plan(gm: fx.GraphModule, notes: Iterable[Note]) -> tuple[PlanEntry, ...]:
    """The decisions in a FROZEN graph.

    Args:
        gm: the graph.
        notes: notes of the passes; the plan shows their reasons why an edge is float or is not
            quantized as asked.
    """
    kinds = (NoteKind.FLOAT, NoteKind.ADJUSTED)
    reasons = {note.site: note.reason for note in notes if note.kind in kinds}
    entries = []
    for edge in edges(gm):
        quantized = isinstance(submodule(gm, edge.source), Quantizer)
        entries.append(
            PlanEntry(
                edge=edge.name,
                path=edge.path,
                op=str(edge.kind),
                arg=str(edge.arg),
                fed_by=fed_by(edge),
                spec=edge.spec,
                quantizer=str(edge.source.target) if quantized else None,
                reason=reasons.get(edge.name, ""),
            )
        )
    return tuple(entries)


@torch.no_grad()
def measure_quantizers(gm: fx.GraphModule, images: Tensor) -> tuple[dict[str, float], list[Tensor]]:
    """Measures the signal to noise of every quantizer in the quantized network.

    Args:
        gm: a graph in stage FROZEN.
        images: ``(B, …)`` on the graph's device.

    Returns:
        Quantizer name -> decibels, and the float tensors among the outputs.
    """
    measured: dict[str, float] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            measured[name] = _decibels([args[0]], [output])

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in gm.named_modules()
        if isinstance(module, Quantizer)
    ]
    try:
        outputs = float_outputs(gm(images))
    finally:
        for handle in handles:
            handle.remove()
    return measured, outputs


def sqnr_of(reference: list[Tensor], outputs: list[Tensor]) -> float:
    """Decibels of all outputs together, without values that are infinite in the reference."""
    finite = [value.isfinite() for value in reference]
    quantized = [value[mask] for value, mask in zip(outputs, finite, strict=True)]
    exact = [value[mask] for value, mask in zip(reference, finite, strict=True)]
    return _decibels(exact, quantized)


def _decibels(signals: list[Tensor], quantized: list[Tensor]) -> float:
    pairs = list(zip(signals, quantized, strict=True))
    signal_energy = sum(float(signal.double().square().sum()) for signal, _ in pairs)
    noise_energy = sum(float((value - signal).double().square().sum()) for signal, value in pairs)
    return decibels(signal_energy, noise_energy)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The record of a compilation.

    Attributes:
        policy: name of the policy.
        plan: the decision for each edge.
        sqnr: quantizer name -> signal to noise on the first calibration images, dB.
        output_sqnr: signal to noise of the model's outputs against the float model's, dB.
        images: number of calibration images.
        float_bytes: size of the float parameters.
        quantized_bytes: size of the quantized parameters, weights at their bit-width, and scales.
        seconds: phase -> wall time.
        changes: pass -> number of sites changed.
        notes: sites that were not changed, with reasons, and other remarks of the passes.
        comparisons: errors with the choices of passes over errors without them.
        allocation: the chosen widths; None where the policy's rules set all widths.
        outputs: error of each output against the float model's, on the first calibration images.
    """

    policy: str
    plan: tuple[PlanEntry, ...]
    sqnr: dict[str, float]
    output_sqnr: float
    images: int
    float_bytes: int
    quantized_bytes: int
    seconds: dict[str, float]
    changes: dict[str, int] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    allocation: AllocationResult | None = None
    outputs: tuple[OutputError, ...] = ()

    @property
    def left_float(self) -> tuple[PlanEntry, ...]:
        """The edges that could be quantized but were not, each with a reason."""
        return tuple(entry for entry in self.plan if entry.spec is None)

    @property
    def unsupported(self) -> tuple[tuple[str, str], ...]:
        """(node, reason) of products that have no quantized form."""
        unsupported = (note for note in self.notes if note.kind is NoteKind.UNSUPPORTED)
        return tuple((note.site, note.reason) for note in unsupported)

    @property
    def gains(self) -> tuple[tuple[str, str, str, str, float], ...]:
        """Deprecated form of ``comparisons``: (pass, site, choice, measure, ratio) each."""
        warnings.warn("Report.gains is now Report.comparisons", DeprecationWarning, stacklevel=2)
        return tuple(
            (item.step, item.site, item.choice, item.measure, item.error_ratio)
            for item in self.comparisons
        )

    def summary(self) -> str:
        """A line with the numbers of edges and images, the noise, the sizes and the time."""
        quantized = len(self.plan) - len(self.left_float)
        unsupported = {site for site, _ in self.unsupported}
        have = "product has" if len(unsupported) == 1 else "products have"
        remark = f" ({len(unsupported)} {have} no quantized form)" if unsupported else ""
        return (
            f"{self.policy}: {quantized} of {len(self.plan)} edges quantized{remark}, "
            f"outputs at {self.output_sqnr:.1f} dB{self._output_remark()}, "
            f"{self.images} calibration images, parameters {self.float_bytes / 1e6:.2f} -> "
            f"{self.quantized_bytes / 1e6:.2f} MB, {sum(self.seconds.values()):.1f} s"
        )

    def _output_remark(self) -> str:
        """The error of an only output that is not logits; the errors of several have lines."""
        if len(self.outputs) != 1 or self.outputs[0].kind is OutputKind.LOGITS:
            return ""
        (error,) = self.outputs
        return f" (cosine {error.cosine:.4f}, MAE {error.mae:.3g})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; decibels that are not finite become texts."""
        values = asdict(self)
        values["sqnr"] = {name: _to_json(value) for name, value in self.sqnr.items()}
        values["output_sqnr"] = _to_json(self.output_sqnr)
        values["outputs"] = [error.to_dict() for error in self.outputs]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Restores a report from the values of :meth:`to_dict`."""
        plan = tuple(
            PlanEntry(**{**e, "spec": None if e["spec"] is None else spec_from_dict(e["spec"])})
            for e in values["plan"]
        )
        sqnr = {name: float(value) for name, value in values["sqnr"].items()}
        notes = tuple(Note(**{**note, "kind": NoteKind(note["kind"])}) for note in values["notes"])
        allocation = values["allocation"]
        return cls(
            **{
                **values,
                "plan": plan,
                "sqnr": sqnr,
                "output_sqnr": float(values["output_sqnr"]),
                "notes": notes,
                "comparisons": tuple(Comparison(**item) for item in values["comparisons"]),
                "outputs": tuple(OutputError.from_dict(e) for e in values.get("outputs", ())),
                "allocation": None
                if allocation is None
                else AllocationResult.from_dict(allocation),
            }
        )

    def __str__(self) -> str:
        """The table of edges, the edges that stayed float with reasons, and the summary."""
        table = Table("edge", "fed by", "bits", "granularity", "observer", "SQNR dB")
        for entry in self.plan:
            spec = entry.spec
            if spec is None or entry.quantizer is None:
                table.add_row(entry.edge, entry.fed_by, "float", "", "", "")
                continue
            kind = f"{spec.bits} {FAMILIES[spec.scheme].label(spec)}"
            decibel = f"{self.sqnr.get(entry.quantizer, float('nan')):.1f}"
            table.add_row(entry.edge, entry.fed_by, kind, spec.granularity, spec.observer, decibel)
        console = Console(file=io.StringIO(), width=120)
        console.print(table)
        if self.allocation is not None:
            console.print(self.allocation.table())
            console.print(self.allocation.summary(), soft_wrap=True)
        for entry in self.plan:
            if entry.reason:
                console.print(f"{entry.edge}: {entry.reason}", soft_wrap=True)
        for item in self.comparisons:
            ratio = f"{item.measure} x {item.error_ratio:.2f}"
            console.print(f"{item.step}: {item.site}: {item.choice}: {ratio}", soft_wrap=True)
        printed = {entry.edge for entry in self.plan}
        for note in self.notes:
            if note.site not in printed:
                line = f"{note.step}: {note.site or '(model)'}: {note.reason}"
                console.print(line, soft_wrap=True)
        for error in self.outputs:
            console.print(str(error), soft_wrap=True)
        console.print(self.summary(), soft_wrap=True)
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def _to_json(decibels: float) -> float | str:
    return decibels if math.isfinite(decibels) else str(decibels)


def spec_from_dict(values: dict[str, Any]) -> TensorSpec:
    """Builds a TensorSpec from plain values, the result of ``dataclasses.asdict``."""
    return TensorSpec(
        **{
            **values,
            "scheme": Scheme(values["scheme"]),
            "granularity": Granularity(values["granularity"]),
            "observer": ObserverKind(values["observer"]),
        }
    )
