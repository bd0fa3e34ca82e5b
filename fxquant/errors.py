"""Every error fxquant raises on purpose.

All derive from :class:`FxQuantError`. A message says what went wrong, where (edge or module
path), what was found and expected, and what to do about it.
"""


class FxQuantError(Exception):
    """Base of all errors of this package.

    Attributes:
        edge: name of the edge that the error is about, None where it is about no single edge.
        got: the value that was refused, None where there is no single one.
        expected: the value, or the range in words, that stands in its place.
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
    """No preset or policy file of that name."""


class UnknownKeyError(PolicyError):
    """A policy file or dict names a key or value that does not exist."""


class BitWidthError(PolicyError):
    """A bit-width outside 2..16."""


class UnusedRuleError(PolicyError):
    """A rule that matched no edge of the model."""


class CalibrationError(FxQuantError):
    """The calibration data or what it produced cannot be used."""


class EmptyLoaderError(CalibrationError):
    """The calibration loader gave no batch."""


class BatchError(CalibrationError):
    """A batch has the wrong type or shape."""


class NonFiniteError(CalibrationError):
    """NaN or infinity in an image, a weight or an activation."""


class PassError(FxQuantError):
    """A pass was run in the wrong stage or failed."""


class VerifyError(FxQuantError):
    """The graph breaks a rule of its stage: a bug in a pass."""


class LoweringError(FxQuantError):
    """A backend cannot express the graph."""


class OutputError(FxQuantError):
    """A file or folder could not be written; nothing half-written is left."""


class FileFormatError(FxQuantError):
    """A file is missing, truncated, or not of the expected kind."""


class ModelError(FxQuantError):
    """A model, its arguments or its weights could not be found or loaded."""


class DataError(FxQuantError):
    """A folder of images is missing or empty, holds a damaged file, or does not fit the model."""
