"""fxquant: a compiler that quantizes vision transformers after training.

``compile()`` captures a model as an FX graph, annotates the inputs of its products with
quantizers, fits them on calibration images, and gives a :class:`CompiledModel` that runs, explains
itself, and lowers to onnxruntime or to integer kernels.

Public names are imported on first use (PEP 562), so that ``fxquant --help`` need not wait for
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fxquant import errors
from fxquant._version import __version__
from fxquant.errors import FxQuantError

if TYPE_CHECKING:
    from fxquant import policies
    from fxquant.compiled.model import CompiledModel, load
    from fxquant.compiled.report import Report
    from fxquant.compiler import compile
    from fxquant.config.allocation import Allocation, Budget
    from fxquant.config.low_rank import LowRank
    from fxquant.config.recovery import Compensation, Reconstruction
    from fxquant.config.spec import Granularity, ObserverKind, Scheme, TensorSpec
    from fxquant.policies.policy import Policy, Rule
else:
    # Module of each public name that is imported on first use.
    _LAZY = {
        "Allocation": "fxquant.config.allocation",
        "Budget": "fxquant.config.allocation",
        "Compensation": "fxquant.config.recovery",
        "CompiledModel": "fxquant.compiled.model",
        "Granularity": "fxquant.config.spec",
        "LowRank": "fxquant.config.low_rank",
        "ObserverKind": "fxquant.config.spec",
        "Policy": "fxquant.policies.policy",
        "Reconstruction": "fxquant.config.recovery",
        "Report": "fxquant.compiled.report",
        "Rule": "fxquant.policies.policy",
        "Scheme": "fxquant.config.spec",
        "TensorSpec": "fxquant.config.spec",
        "compile": "fxquant.compiler",
        "load": "fxquant.compiled.model",
    }

    def __getattr__(name):
        if name == "policies":
            return import_module("fxquant.policies")
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
