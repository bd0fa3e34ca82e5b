"""Conversion of saved configurations of older versions to the current format.

Format 4 (version 0.1): specs of edges were only in the plan of the report; notes were
``[pass, site, reason]``, comparisons ``[pass, site, choice, measure, ratio]`` under ``gains``; the
policy has options under their old names.
"""

from __future__ import annotations

from typing import Any

from fxquant.config.allocation import Allocation
from fxquant.config.recovery import Compensation, Reconstruction
from fxquant.config.renamed import new_names_of
from fxquant.config.scale_search import ScaleSearch
from fxquant.utils.notes import NoteKind

READABLE = (4, 5)
_SECTIONS: dict[str, type] = {
    "search": ScaleSearch,
    "allocation": Allocation,
    "compensation": Compensation,
    "reconstruction": Reconstruction,
}


def to_current_format(config: dict[str, Any]) -> dict[str, Any]:
    """Converts a configuration of any readable format to the current format.

    Args:
        config: the configuration as read; not changed, since its digest is checked.
    """
    if config["format"] != 4:
        return config
    report = dict(config["report"])
    plan = report["plan"]
    report["notes"] = [
        {"kind": _kind(step, site, reason), "site": site, "reason": reason, "step": step}
        for step, site, reason in report["notes"]
    ]
    report["comparisons"] = [
        {"site": site, "choice": choice, "measure": measure, "error_ratio": ratio, "step": step}
        for step, site, choice, measure, ratio in report.pop("gains", ())
    ]
    report.setdefault("allocation", None)
    specs = {entry["edge"]: entry["spec"] for entry in plan if entry["spec"] is not None}
    policy = dict(config["policy"])
    for section in _SECTIONS.keys() & policy.keys():
        new_names = new_names_of(_SECTIONS[section])
        policy[section] = {new_names.get(k, k): v for k, v in policy[section].items()}
    current = {"format": READABLE[-1], "specs": specs, "report": report, "policy": policy}
    return {**config, **current}


def _kind(step: str, site: str, reason: str) -> NoteKind:
    """The kind of a note of format 4, which had no kinds: decided by its pass and its words."""
    if step == "capture":
        return NoteKind.MODEL
    if step == "OpenEinsum":
        return NoteKind.UNSUPPORTED
    if step != "AssignSpecs":
        return NoteKind.SKIPPED
    if site.startswith("rule "):
        return NoteKind.RULE
    if "has no quantized form" in reason:
        return NoteKind.UNSUPPORTED
    return NoteKind.FLOAT if reason.startswith("left float") else NoteKind.ADJUSTED
