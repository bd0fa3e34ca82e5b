"""Checks of a model before it is captured, without running it."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxquant.errors import CaptureError, NonFiniteError, TrainingModeError
from fxquant.graph.meta import CODE_NAMES
from fxquant.quantizers import Quantizer


@torch.no_grad()
def check_model(model: nn.Module) -> None:
    """Checks a model without running it.

    Raises:
        CaptureError: not a module, TorchScript, on the meta device, quantized, or not float32.
        TrainingModeError: the model or a submodule is in training mode.
        NonFiniteError: a parameter holds NaN or infinity, or a buffer NaN.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model must be a torch.nn.Module, got {type(model).__name__}",
            got=model,
            expected=nn.Module,
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "TorchScript cannot be captured: give the nn.Module that the model was made from"
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(
            "weights are on the meta device, which holds no numbers: build the model on the CPU, "
            "or call model.to_empty(device='cpu'), and load a checkpoint"
        )
    quantized = [name for name, module in model.named_modules() if _is_quantized(module)]
    if quantized:
        raise CaptureError(
            f"the model is quantized already (module {quantized[0] or '(root)'}): give compile() "
            "the float model that it was made from",
            edge=quantized[0],
        )
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise TrainingModeError(
            f"in training mode: {', '.join(name or 'the model itself' for name in training[:3])}"
            f"{' …' if len(training) > 3 else ''}; call model.eval() before compile()",
            edge=training[0],
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            raise CaptureError(
                f"weight {name} is {parameter.dtype}; quantization starts from float32: call "
                "model.float() before compile(), and give float32 images",
                edge=name,
                got=parameter.dtype,
                expected=torch.float32,
            )
    # A buffer may hold infinity: attention masks do.
    bad = [(name, torch.isfinite(value).logical_not()) for name, value in model.named_parameters()]
    bad += [(n, v.isnan()) for n, v in model.named_buffers() if v.is_floating_point()]
    for name, wrong in bad:
        if bool(wrong.any()):
            raise NonFiniteError(
                f"weight {name} holds NaN or infinity; the checkpoint is damaged or training "
                "diverged: load another",
                edge=name,
            )


def _is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantizer, or a graph that a backend lowered to integer codes."""
    lowered = isinstance(module, fx.GraphModule) and CODE_NAMES.get(module) is not None
    return lowered or isinstance(module, Quantizer)
