"""The passes of the compiler, one file each; `CONTRIBUTING.md` says how to write one."""

from fxquant.passes.allocate_bits import AllocateBits
from fxquant.passes.assign_specs import AssignSpecs
from fxquant.passes.attach_low_rank import AttachLowRank
from fxquant.passes.base import Pass, PassResult, Skip, run_passes
from fxquant.passes.compensate import Compensate
from fxquant.passes.correct_bias import CorrectBias
from fxquant.passes.drop_noops import DropNoOps
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.passes.fold_constants import FoldConstants
from fxquant.passes.freeze import Freeze
from fxquant.passes.insert_observers import InsertObservers
from fxquant.passes.name_nodes import NameNodes
from fxquant.passes.open_einsum import OpenEinsum
from fxquant.passes.quantize_bias import QuantizeBias
from fxquant.passes.reconstruct import Reconstruct
from fxquant.passes.reparameterize import Reparameterize
from fxquant.passes.scale_after_matmul import ScaleAfterMatmul
from fxquant.passes.search_scales import SearchScales
from fxquant.passes.smooth_with_bias import SmoothWithBias
from fxquant.passes.split_attention import SplitAttention
from fxquant.passes.split_projections import SplitProjections
from fxquant.passes.to_linear import ToLinear
from fxquant.passes.unify_moves import UnifyMoves

__all__ = [
    "AllocateBits",
    "AssignSpecs",
    "AttachLowRank",
    "Compensate",
    "CorrectBias",
    "DropNoOps",
    "FoldBatchNorm",
    "FoldConstants",
    "Freeze",
    "InsertObservers",
    "NameNodes",
    "OpenEinsum",
    "Pass",
    "PassResult",
    "QuantizeBias",
    "Reconstruct",
    "Reparameterize",
    "ScaleAfterMatmul",
    "SearchScales",
    "Skip",
    "SmoothWithBias",
    "SplitAttention",
    "SplitProjections",
    "ToLinear",
    "UnifyMoves",
    "run_passes",
]
