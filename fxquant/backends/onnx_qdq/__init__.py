"""ONNX backend: QDQ files for onnxruntime."""

from fxquant.backends.onnx_qdq.doctor import DoctorReport, doctor
from fxquant.backends.onnx_qdq.export import OnnxExport, export_onnx
from fxquant.backends.onnx_qdq.runtime import Unfused, make_session
from fxquant.backends.onnx_qdq.target import TARGETS, Target

__all__ = [
    "TARGETS",
    "DoctorReport",
    "OnnxExport",
    "Target",
    "Unfused",
    "doctor",
    "export_onnx",
    "make_session",
]
