"""The canonical dialect: which aten operators are products, data movement and producers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxquant.config.vocabulary import Arg, OpKind

aten = torch.ops.aten

_PRODUCT_KINDS: dict[Any, OpKind] = {
    aten.linear.default: OpKind.LINEAR,
    aten.conv1d.default: OpKind.CONV,
    aten.conv1d.padding: OpKind.CONV,
    aten.conv2d.default: OpKind.CONV,
    aten.conv2d.padding: OpKind.CONV,
    aten.conv3d.default: OpKind.CONV,
    aten.conv3d.padding: OpKind.CONV,
    aten.matmul.default: OpKind.MATMUL,
}

# Kind of operation -> position of each argument that can be quantized.
OPERANDS: dict[OpKind, dict[Arg, int]] = {
    OpKind.LINEAR: {Arg.INPUT: 0, Arg.WEIGHT: 1},
    OpKind.CONV: {Arg.INPUT: 0, Arg.WEIGHT: 1},
    OpKind.MATMUL: {Arg.LHS: 0, Arg.RHS: 1},
    OpKind.LAYER_NORM: {Arg.INPUT: 0},
    OpKind.RMS_NORM: {Arg.INPUT: 0},
    OpKind.SOFTMAX: {Arg.INPUT: 0},
    OpKind.ACTIVATION: {Arg.INPUT: 0},
    OpKind.ADD: {Arg.LHS: 0, Arg.RHS: 1},
}

_ACTIVATION_NAMES = "gelu silu relu relu6 hardswish hardsigmoid sigmoid tanh elu leaky_relu mish"
_ELEMENTWISE_KINDS: dict[Any, OpKind] = {
    aten.layer_norm.default: OpKind.LAYER_NORM,
    aten.rms_norm.default: OpKind.RMS_NORM,
    aten.softmax.int: OpKind.SOFTMAX,
    aten._softmax.default: OpKind.SOFTMAX,
    aten.add.Tensor: OpKind.ADD,
    **{getattr(aten, name).default: OpKind.ACTIVATION for name in _ACTIVATION_NAMES.split()},
}

# Products without a quantized form. The report names each one that a model has.
_UNSUPPORTED_NAMES = (
    "conv_transpose1d conv_transpose2d conv_transpose3d convolution conv_tbc bilinear tensordot "
    "inner mv dot vdot addmv addbmm chain_matmul linalg_multi_dot lstm gru rnn_tanh rnn_relu "
    "lstm_cell gru_cell embedding_bag cdist einsum"
)
UNSUPPORTED: dict[Any, str] = {
    getattr(getattr(aten, name), overload): f"left float: {name} has no quantized form yet"
    for name in _UNSUPPORTED_NAMES.split()
    for overload in getattr(aten, name).overloads()
}

# Operations that move values and never change them.
DATA_MOVEMENT_OPS: frozenset[Any] = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.unbind.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.roll.default,
        aten.pad.default,
        operator.getitem,
    }
)

# Operations that rules name by ``fed_by``, with the name.
PRODUCERS: dict[Any, str] = {
    aten.softmax.int: "softmax",
    aten._softmax.default: "softmax",
    aten.gelu.default: "gelu",
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.relu6.default: "relu",
    aten.hardswish.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.layer_norm.default: "layer_norm",
    aten.rms_norm.default: "rms_norm",
    aten.group_norm.default: "group_norm",
    aten.batch_norm.default: "batch_norm",
    aten._native_batch_norm_legit_no_training.default: "batch_norm",
    aten.add.Tensor: "add",
    aten.mul.Tensor: "mul",
    aten.cat.default: "cat",
    aten.mean.dim: "mean",
    aten.adaptive_avg_pool1d.default: "mean",
    aten.adaptive_avg_pool2d.default: "mean",
}

# All names that ``fed_by`` may have in a rule.
PRODUCER_NAMES: frozenset[str] = frozenset(
    {*PRODUCERS.values(), *(str(k) for k in OpKind if k.is_product), "image", "parameter"}
)


def op_kind(node: fx.Node) -> OpKind | None:
    """Kind of a product (linear, convolution or matmul), None for any other node."""
    return _PRODUCT_KINDS.get(node.target) if node.op == "call_function" else None


def elementwise_kind(node: fx.Node) -> OpKind | None:
    """Kind of a norm, softmax, activation function or addition, None for any other node."""
    return _ELEMENTWISE_KINDS.get(node.target) if node.op == "call_function" else None
