"""Errors that fxquant raises.

All errors derive from :class:`FxQuantError`. A message names the problem, its place (edge or module
path), the actual and the expected value, and a remedy.
"""


class FxQuantError(Exception):
    """Base of all errors of this package.

    Attributes:
        edge: name of the edge or node, or path of the module or tensor, that the error is about
            ("" is the whole model); None where the error is not about one of these.
        got: the refused value itself, such as a number, a shape, a type or the path of a file; None
            where the error is not about one value.
        expected: the accepted value or class, a tuple of these, or the accepted range in words.
    """

    edge: str | None
    got: object
    expected: object

    def __init__(
        self,
        message: str,
        *,
        edge: str | None = None,
        got: object = None,
        expected: object = None,
    ) -> None:
        super().__init__(message)
        self.edge, self.got, self.expected = edge, got, expected


class CaptureError(FxQuantError):
    """The model could not be turned into a graph."""


class TrainingModeError(CaptureError):
    """The model, or a part of it, is in training mode."""


class ControlFlowError(CaptureError):
    """The model branches on the values of a tensor."""


class NothingToQuantizeError(CaptureError):
    """The captured graph holds no linear, convolution or matrix product."""


class PolicyError(FxQuantError):
    """A policy is malformed or does not fit the model."""


class UnknownPresetError(PolicyError):
    """A preset or policy file does not exist."""


class UnknownKeyError(PolicyError):
    """A policy file or dict names a key or value that does not exist."""


class BitWidthError(PolicyError):
    """A bit-width is outside 2..16."""


class UnusedRuleError(PolicyError):
    """A rule matched no edge of the model."""


class CalibrationError(FxQuantError):
    """Calibration data, or the activations or gradients that it causes, cannot be used."""


class EmptyLoaderError(CalibrationError):
    """The calibration loader yielded no batch."""


class BatchError(CalibrationError):
    """A batch has the wrong type or shape."""


class NonFiniteError(CalibrationError):
    """An image, a weight or an activation holds NaN or infinity."""


class PassError(FxQuantError):
    """A pass was run in the wrong stage or failed."""


class VerifyError(FxQuantError):
    """The graph breaks a rule of its stage: a bug in a pass."""


class LoweringError(FxQuantError):
    """A backend cannot express the graph."""


class OutputError(FxQuantError):
    """A file or folder could not be written; no incomplete file remains."""


class PathTypeError(FxQuantError, TypeError):
    """An argument that names a file or folder is neither text nor a path."""


class FileFormatError(FxQuantError):
    """A file is missing, truncated, or not of the expected kind."""


class ModelError(FxQuantError):
    """A model, its arguments or its weights could not be found or loaded."""


class DataError(FxQuantError):
    """A folder of images is missing or empty, holds a damaged file, or does not fit the model."""
