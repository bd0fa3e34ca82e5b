"""The passes of the compiler, one file each; `CONTRIBUTING.md` describes how to write one."""

from fxquant.passes.allocate_bits import AllocateBits
from fxquant.passes.assign_specs import AssignSpecs
from fxquant.passes.attach_low_rank import AttachLowRank
from fxquant.passes.base import Comparison, Note, NoteKind, Pass, PassResult, Refusal
from fxquant.passes.canonical.canonicalize_data_movement import CanonicalizeDataMovement
from fxquant.passes.canonical.drop_noops import DropNoOps
from fxquant.passes.canonical.fold_batch_norm import FoldBatchNorm
from fxquant.passes.canonical.fold_constants import FoldConstants
from fxquant.passes.canonical.name_nodes import NameNodes
from fxquant.passes.canonical.open_einsum import OpenEinsum
from fxquant.passes.canonical.scale_after_matmul import ScaleAfterMatmul
from fxquant.passes.canonical.split_attention import SplitAttention
from fxquant.passes.canonical.split_projections import SplitProjections
from fxquant.passes.canonical.to_linear import ToLinear
from fxquant.passes.centre_heads import CentreHeads
from fxquant.passes.compensate import Compensate
from fxquant.passes.correct_bias import CorrectBias
from fxquant.passes.defer_softmax import DeferSoftmax
from fxquant.passes.freeze import Freeze
from fxquant.passes.insert_observers import InsertObservers
from fxquant.passes.mark_embeddings import MarkEmbeddings
from fxquant.passes.pipeline import Pipeline, run_passes
from fxquant.passes.quantize_bias import QuantizeBias
from fxquant.passes.reconstruct import Reconstruct
from fxquant.passes.reparameterize import Reparameterize
from fxquant.passes.rotate_heads import RotateHeads
from fxquant.passes.rotate_hidden import RotateHidden
from fxquant.passes.rotate_residual import RotateResidual
from fxquant.passes.search_scales import SearchScales
from fxquant.passes.smooth_with_bias import SmoothWithBias

__all__ = [
    "AllocateBits",
    "AssignSpecs",
    "AttachLowRank",
    "CanonicalizeDataMovement",
    "CentreHeads",
    "Comparison",
    "Compensate",
    "CorrectBias",
    "DeferSoftmax",
    "DropNoOps",
    "FoldBatchNorm",
    "FoldConstants",
    "Freeze",
    "InsertObservers",
    "MarkEmbeddings",
    "NameNodes",
    "Note",
    "NoteKind",
    "OpenEinsum",
    "Pass",
    "PassResult",
    "Pipeline",
    "QuantizeBias",
    "Reconstruct",
    "Refusal",
    "Reparameterize",
    "RotateHeads",
    "RotateHidden",
    "RotateResidual",
    "ScaleAfterMatmul",
    "SearchScales",
    "SmoothWithBias",
    "SplitAttention",
    "SplitProjections",
    "ToLinear",
    "run_passes",
]
