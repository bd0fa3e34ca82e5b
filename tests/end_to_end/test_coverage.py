"""Every model family: compiled, exported, run at two batch sizes, equal to the simulation."""

from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.backends.onnx_qdq import make_session
from tests.helpers.agreement import assert_same_codes
from tests.helpers.zoo import FAMILIES, Family


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family_runs_in_onnxruntime_as_simulated(family: Family, tmp_path: Path) -> None:
    model = family.model()
    images = torch.randn(5, *family.image, generator=torch.Generator().manual_seed(1))
    compiled = fxquant.compile(model, [images], "w8a8")
    assert not compiled.report.left_float
    exported = compiled.export_onnx(tmp_path / "model.onnx")
    assert sum(exported.fused.values()) > 0
    # What is not fused is a convolution, and says why.
    assert all("Conv" in item.op and item.reason for item in exported.unfused)
    session = make_session(exported.path)
    for batch in (1, 5):
        with torch.no_grad():
            expected = compiled(images[:batch])
        (result,) = session.run(None, {"images": images[:batch].numpy()})
        error = torch.linalg.vector_norm(torch.from_numpy(result) - expected)
        assert error < 0.05 * torch.linalg.vector_norm(expected)
    assert_same_codes(compiled, exported.path, images)
