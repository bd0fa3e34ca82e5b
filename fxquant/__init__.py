"""fxquant: a compiler that quantizes vision transformers after training.

``compile()`` captures a model as an FX graph, annotates the inputs of its products with
quantizers, fits them on calibration images, and gives a :class:`CompiledModel` that runs, explains
itself, and lowers to onnxruntime or to integer kernels.
"""

from fxquant import errors, policies
from fxquant._version import __version__
from fxquant.compiled.model import CompiledModel, load
from fxquant.compiled.report import Report
from fxquant.compiler import compile
from fxquant.config.allocation import Allocation, Budget
from fxquant.config.low_rank import LowRank
from fxquant.config.recovery import Compensation, Reconstruction
from fxquant.config.spec import Granularity, ObserverKind, Scheme, TensorSpec
from fxquant.errors import FxQuantError
from fxquant.policies.policy import Policy, Rule

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
