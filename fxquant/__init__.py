"""fxquant: a compiler that quantizes vision transformers after training.

``compile()`` captures a model as an FX graph, annotates the inputs of its products with
quantizers, fits them on calibration images, and gives a :class:`CompiledModel` that runs, explains
itself, and lowers to onnxruntime or to integer kernels.
"""

from fxquant import errors, policies
from fxquant._version import __version__
from fxquant.budget import Allocation, Budget
from fxquant.compiler import compile
from fxquant.errors import FxQuantError
from fxquant.low_rank import LowRank
from fxquant.model import CompiledModel, load
from fxquant.policy import Policy, Rule
from fxquant.recovery import Compensation, Reconstruction
from fxquant.report import Report
from fxquant.spec import Granularity, ObserverKind, Scheme, TensorSpec

__all__ = [
    "Allocation",
    "Budget",
    "Compensation",
    "CompiledModel",
    "FxQuantError",
    "Granularity",
    "LowRank",
    "ObserverKind",
    "Policy",
    "Reconstruction",
    "Report",
    "Rule",
    "Scheme",
    "TensorSpec",
    "__version__",
    "compile",
    "errors",
    "load",
    "policies",
]
