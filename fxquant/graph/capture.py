"""Captures an ``nn.Module`` as an FX graph with parameters of its own."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxquant.config.vocabulary import Stage
from fxquant.errors import (
    BatchError,
    CaptureError,
    ControlFlowError,
)
from fxquant.graph.check_model import check_model
from fxquant.graph.meta import HOOKED_MODULES, STAGE
from fxquant.graph.nodes import module_path, source_line
from fxquant.utils.quiet import quiet

# torch.export would treat a size of 0 or 1 as a constant.
_EXAMPLE_BATCH = 3


def capture(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """Captures ``model`` with ``torch.export``, for any batch size.

    The user's model is not changed: the graph has a copy of the weights, and the user's forward
    hooks are not in the graph.

    Args:
        model: in eval mode; its forward reads one image tensor.
        images: example batch ``(B, …)``; only its shape and dtype count.

    Returns:
        A graph of aten operators in stage FLOAT, with one placeholder.

    Raises:
        CaptureError: ``model`` is not a module, not float32, or torch.export cannot capture it.
        TrainingModeError: ``model`` or a submodule is in training mode.
        ControlFlowError: ``model`` branches on tensor values.
        NonFiniteError: a parameter or buffer holds NaN or infinity.
        BatchError: ``model`` does not run on the images.
    """
    check_model(model)
    copied = own_copy(model)
    example = images[:1].to(device_of(copied))
    example = example.expand(_EXAMPLE_BATCH, *images.shape[1:]).contiguous()
    # Export warns of caches that the model fills, such as LeViT's; only the copy's are filled.
    with torch.no_grad(), _plain_attention(), quiet():
        try:
            program = torch.export.export(
                copied, (example,), dynamic_shapes=({0: Dim("batch")},), strict=False
            )
            if _mutates(program):
                program = program.run_decompositions({})
        except Exception as error:  # torch.export documents no common base class
            _check_images(copied, images)
            raise _explain(error, copied, tuple(example.shape)) from error
    gm = _plain_graph(program)
    HOOKED_MODULES.set(gm, tuple(_hooked(model)))
    return gm


def _check_images(model: nn.Module, images: Tensor) -> None:
    """Checks whether images are the reason that a model could not be captured.

    Raises:
        BatchError: the model does not run on the images.
        CaptureError: the model needs other inputs too.
    """
    inputs = _required_inputs(model)
    if len(inputs) > 1:
        raise CaptureError(
            f"the model takes {len(inputs)} inputs ({', '.join(inputs)}), and one image tensor is "
            "supported: wrap it in a module whose forward(images) gives the others a fixed value",
            got=tuple(inputs),
        )
    try:
        model(images.to(device_of(model)))
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        raise BatchError(
            f"the model does not take images of shape {tuple(images.shape)} and type "
            f"{images.dtype} ({error}); give them as model(images) takes them, (B, C, H, W) of "
            "its input size",
            got=tuple(images.shape),
        ) from error


def _required_inputs(model: nn.Module) -> list[str]:
    """Names of the arguments of forward without a default."""
    return [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _hooked(model: nn.Module) -> Iterator[str]:
    """Paths of modules with hooks of the user, which the graph does not contain."""
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(map(_is_user_hook, hooks)):
            yield name


def _is_user_hook(hook: object) -> bool:
    """Whether a hook is the user's; torch's own hooks (``weight_norm``) compute weights."""
    return not type(hook).__module__.startswith("torch.nn.utils")


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model without the user's hooks and without gradients.

    Torch's own hooks (``weight_norm``) compute weights and stay. Computed tensors that a module
    keeps as plain attributes, such as the weights that these hooks compute, are copied detached.

    Raises:
        CaptureError: the model cannot be copied.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        copied = copy.deepcopy(model, computed)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise CaptureError(
            f"the model cannot be deep-copied ({error}); remove what cannot be copied from its "
            "attributes, or rebuild it and load its state dict"
        ) from error
    for module in copied.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = getattr(module, name)
            for key, hook in list(hooks.items()):
                if _is_user_hook(hook):
                    del hooks[key]
    return copied.requires_grad_(False)


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer of a model; the CPU for a model without."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Turns off the fused inference kernel of nn.MultiheadAttention, which export cannot open."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _mutates(program: ExportedProgram) -> bool:
    """Whether the program writes in place, which only a decomposition removes."""
    return any(
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        for node in program.graph.nodes
    )


def _plain_graph(program: ExportedProgram) -> fx.GraphModule:
    """The program as a graph with a plain signature: one tensor in, the user's outputs out.

    Outputs in tuples, lists and dicts stay in them; other containers become a tuple of tensors.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _inline_regions(module)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.nodes):
        # The graph must not write into the user's images, as a model may write into its input.
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder":
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
    output = graph.output_node()
    leaves = pytree.tree_leaves(output.args[0])
    spec = program.call_spec.out_spec
    nested = spec is not None and _builtin_containers(spec)
    output.args = (pytree.tree_unflatten(leaves, spec) if nested else tuple(leaves),)
    graph._tracer_cls = None  # export's tracer cannot be created again, as unpickling does
    gm = fx.GraphModule(module, graph)
    STAGE.set(gm, Stage.FLOAT)
    return gm


def _inline_regions(gm: fx.GraphModule) -> None:
    """Replaces ``no_grad`` and ``autocast(enabled=False)`` regions by their bodies.

    Raises:
        CaptureError: autocast is on in a region, which would compute in lower precision.
    """
    regions = torch.ops.higher_order
    for node in list(gm.graph.nodes):
        if node.target is regions.wrap_with_set_grad_enabled:
            body, operands = node.args[1], node.args[2:]
        elif node.target is regions.wrap_with_autocast:
            if node.args[2]:
                raise CaptureError(
                    f"module {module_path(node) or '(root)'} at {source_line(node)}: autocast is "
                    "on inside the model; quantization starts from float32: take the region out",
                    edge=module_path(node),
                )
            body, operands = node.args[4], node.args[5:]
        else:
            continue
        _inline(gm, node, body, operands)
    gm.graph.eliminate_dead_code()


def _inline(gm: fx.GraphModule, call: fx.Node, body: fx.Node, operands: Sequence[Any]) -> None:
    """Replaces the call of a region by copies of the nodes in its body."""
    inner = gm.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    _inline_regions(inner)
    values: dict[fx.Node, Any] = {}
    inputs = iter(operands)
    with gm.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "output":
                results = node.args[0]
            else:
                values[node] = gm.graph.node_copy(node, values.__getitem__)
                if node.op == "get_attr":
                    values[node].target = f"{body.target}.{node.target}"
    for user in list(call.users):  # getitem for each result
        user.replace_all_uses_with(values[results[user.args[1]]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def _builtin_containers(spec: pytree.TreeSpec) -> bool:
    """Whether outputs nest tuples, lists and dicts alone, which an FX graph can return."""
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(map(_builtin_containers, spec.children()))


def _explain(error: Exception, model: nn.Module, shape: tuple[int, ...]) -> CaptureError:
    """An error with module path, source line and advice, for an error of torch.export."""
    path, line = _place(error, model)
    where = f"module {path or '(root)'} at {line or 'unknown line'}"
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    kind = f"{type(error).__name__}: {first}"
    if "DataDependent" in type(error).__name__ or "data-dependent" in str(error):
        return ControlFlowError(
            f"{where}: the model branches on the values of a tensor, which a graph cannot hold "
            f"({kind}). Rewrite the branch with torch.where, or move it out of the model",
            edge=path,
        )
    if "batch" in str(error) and ("Constraints violated" in str(error) or "speciali" in str(error)):
        return CaptureError(
            f"{where}: the model fixes its batch size ({kind}). Use x.shape[0] or -1 instead of "
            "a number in view, reshape and expand",
            edge=path,
        )
    return CaptureError(
        f"{where}: torch.export cannot capture the model for an input of shape {shape} ({kind}). "
        "Check first that model(images) itself runs for this shape; else rewrite that line in "
        "plain tensor operations",
        edge=path,
        got=shape,
    )


def _place(error: BaseException, model: nn.Module) -> tuple[str, str]:
    """Module path and source line of the user's code that raised ``error``."""
    paths = {id(module): name for name, module in model.named_modules()}
    torch_root = str(Path(torch.__file__).parent)
    path, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner: Any = frame.f_locals.get("self")
        file = frame.f_code.co_filename
        if id(owner) in paths:
            path = paths[id(owner)]
        if not file.startswith(torch_root) and not file.startswith(str(Path(__file__).parent)):
            line = f"{file}:{number}"
    return path, line
