"""Files that older versions wrote: saved folders, pickled models, YAML policies."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fxquant
from fxquant.compiled.integrity import check_specs
from fxquant.compiled.older_formats import to_current_format
from fxquant.compiled.report import spec_from_dict
from fxquant.config.renamed import RenamedOptionWarning
from fxquant.config.spec import ObserverKind, TensorSpec
from fxquant.errors import FileFormatError, LoweringError
from fxquant.graph.edges import quantized_edges
from fxquant.policies.policy_file import policy_to_dict, read_policy, to_yaml
from fxquant.testing import relative_error
from fxquant.utils.notes import NoteKind
from tests.helpers.refusals import refused

DATA = Path(__file__).parents[1] / "data"
POLICIES = sorted((DATA / "policies").glob("*.yaml"))


def assert_computes_what_it_did(model: fxquant.CompiledModel) -> None:
    """Other CPUs add in another order, which moves a few codes of 4 bits by one."""
    kept = load_file(DATA / "format_4_outputs.safetensors")
    outputs = model(kept["images"])
    assert (outputs - kept["outputs"]).abs().max() < 0.05 * kept["outputs"].abs().max()


def test_a_folder_of_format_4_loads() -> None:
    model = fxquant.load(DATA / "format_4")
    assert_computes_what_it_did(model)
    schemes = {str(entry.spec.scheme) for entry in model.plan if entry.spec is not None}
    assert schemes >= {"uniform", "twin_uniform", "dynamic_focusing", "log2", "adalog"}
    assert [entry.edge for entry in model.report.left_float] == ["head__input", "head__weight"]
    assert model.report.allocation is not None
    assert "mean_bits" in str(model.report)
    assert model.report.comparisons and model.report.notes
    kinds = {note.step: set() for note in model.report.notes}
    for note in model.report.notes:
        kinds[note.step].add(note.kind)
    assert kinds.pop("AssignSpecs") == {NoteKind.FLOAT, NoteKind.RULE}
    assert set.union(*kinds.values()) == {NoteKind.SKIPPED}
    assert {item.step for item in model.report.comparisons} >= {"SmoothWithBias"}
    assert all(0 < item.error_ratio < 2 for item in model.report.comparisons)
    assert type(model.report).from_dict(model.report.to_dict()) == model.report


def test_a_folder_of_format_4_is_saved_again_with_the_same_codes(tmp_path: Path) -> None:
    fxquant.load(DATA / "format_4").save(tmp_path)
    old, new = (load_file(f / "model.safetensors") for f in (DATA / "format_4", tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert_computes_what_it_did(fxquant.load(tmp_path))


def test_a_folder_of_format_4_leaves_by_every_way(tmp_path: Path) -> None:
    model = fxquant.load(DATA / "format_4")
    images = load_file(DATA / "format_4_outputs.safetensors")["images"]
    specs = {entry.edge: entry.spec for entry in model.plan if entry.spec is not None}
    assert {edge.name: edge.spec for edge in quantized_edges(model.graph_module)} == specs
    lowered = model.lower("integer")(images)
    assert relative_error(lowered, model(images)) < 0.05
    with refused(LoweringError, got="LogQuantizer"):
        model.export_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("step", "site", "reason", "kind"),
    [
        ("capture", "model", "its hooks are not in the compiled model", NoteKind.MODEL),
        ("OpenEinsum", "einsum", "left float: it sums over nothing", NoteKind.UNSUPPORTED),
        ("AssignSpecs", "lstm", "left float: lstm has no quantized form yet", NoteKind.UNSUPPORTED),
        ("AssignSpecs", "rule 2", "decides nothing: rule 1 matched all", NoteKind.RULE),
        ("AssignSpecs", "head__input", "left float: rule 5 says so", NoteKind.FLOAT),
        ("AssignSpecs", "fc__input", "per tensor: it has no heads", NoteKind.ADJUSTED),
        ("QuantizeBias", "head", "the bias stays float", NoteKind.SKIPPED),
    ],
)
def test_notes_of_format_4_get_their_kind(
    step: str, site: str, reason: str, kind: NoteKind
) -> None:
    report = {"plan": [], "notes": [[step, site, reason]]}  # no gains, no allocation: older still
    config = {"format": 4, "report": report, "policy": {"rules": []}}
    current = to_current_format(config)
    assert current["report"]["notes"][0]["kind"] is kind
    assert current["report"]["comparisons"] == [] and current["report"]["allocation"] is None
    assert config == {"format": 4, "report": report, "policy": {"rules": []}}


def test_policies_of_format_4_get_the_new_names_without_a_warning() -> None:
    options = {"search": {"opt_m": True, "rows": 7}, "reconstruction": {"work": 1e9}}
    options |= {"allocation": {"work": 2.0}, "compensation": {"by_columns": False}}
    config = {"format": 4, "report": {"plan": [], "notes": []}, "policy": options}
    assert to_current_format(config)["policy"] == {
        "search": {"search_region_ratio": True, "rows": 7},
        "reconstruction": {"max_macs": 1e9},
        "allocation": {"max_macs": 2.0},
        "compensation": {"gptq": False},
    }


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda specs: specs.clear(), {}, "has no spec"),
        (
            lambda specs: specs.update(stray__input=next(iter(specs.values()))),
            {"edge": "stray__input"},
            "has no quantizer",
        ),
        (lambda specs: next(iter(specs.values())).update(bits=3), {"expected": 3}, "and a .* of"),
        (
            lambda specs: next(iter(specs.values())).update(scheme="power_of_two"),
            {"got": 8, "expected": 8},
            "scheme power_of_two, and a UniformQuantizer",
        ),
    ],
)
def test_specs_that_do_not_fit_the_quantizers_are_refused(
    change: Any, fields: dict[str, object], message: str
) -> None:
    model = fxquant.load(DATA / "format_4")
    specs = {e.edge: asdict(e.spec) for e in model.plan if e.spec is not None}
    change(specs)
    with refused(FileFormatError, message, **fields):
        check_specs(
            model.graph_module, {name: spec_from_dict(spec) for name, spec in specs.items()}
        )


def test_a_pickled_model_loads() -> None:
    model = torch.load(DATA / "format_4.pt", weights_only=False)
    assert isinstance(model, fxquant.CompiledModel)
    assert_computes_what_it_did(model)


def read_old_policy(path: Path) -> fxquant.Policy:
    """The policy, and as many warnings as the file has options under old names."""
    count = len(re.findall(r"^ +(?:opt_m|by_columns|work):", path.read_text(), re.MULTILINE))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = read_policy(path)
    assert [warning.category for warning in caught] == [RenamedOptionWarning] * count
    return policy


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_policies_load(path: Path, tmp_path: Path) -> None:
    policy = read_old_policy(path)
    assert policy.rules
    assert policy_to_dict(policy)["name"] == policy.name
    (tmp_path / "new.yaml").write_text(to_yaml(policy))
    assert read_policy(tmp_path / "new.yaml") == policy  # without a warning


def test_policies_of_presets_are_what_they_were() -> None:
    wanted = fxquant.policies.aiqvit(weight_bits=4, act_bits=4)
    assert read_old_policy(DATA / "policies" / "aiqvit.yaml") == wanted


def test_old_files_of_presets_keep_what_they_meant() -> None:
    """The presets ``best`` and ``w8a8`` changed after the files were written; the files did not."""
    old, new = read_old_policy(DATA / "policies" / "best.yaml"), fxquant.policies.best(4, 4)
    assert old.smooth and not (old.rotate or old.defer_softmax or old.dense_reconstruction)
    for name in ("rules", "search", "compensation", "reconstruction"):
        assert getattr(old, name) == getattr(new, name)
    old = read_old_policy(DATA / "policies" / "w8a8.yaml")
    assert not old.defer_softmax and fxquant.policies.w8a8().defer_softmax
    assert old.rules[-1].spec == TensorSpec(bits=8, observer=ObserverKind.MSE)
