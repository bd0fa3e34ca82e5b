"""The float network and the quantized network, run block by block over the same images.

The two networks run through the graph together. At each block the quantized network may be changed;
the blocks after it read the outputs of the changed block, while the float network stays the same.
Values at the cut between two blocks are held for all images, in memory or, beyond a budget, in
files that are mapped into memory.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.calibration.network_loss import Override
from fxquant.graph.blocks import Block
from fxquant.graph.capture import device_of
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.graph.liveness import dead_after
from fxquant.graph.meta import EMBEDDINGS
from fxquant.graph.nodes import submodule
from fxquant.graph.outputs import float_outputs
from fxquant.graph.shapes import image_node
from fxquant.graph.sizes import is_size, size_for
from fxquant.utils.progress import Label, track

# Images run at a time where nothing is trained.
CHUNK = 8

Values = dict[str, Tensor]
# A node to run, and the values that no later node of its block reads.
_Step = tuple[fx.Node, list[fx.Node]]


class BlockRunner(GraphInterpreter):
    """Runs one block of a graph on values at its start.

    Args:
        gm: the graph. Its constants and quantizers may be replaced between runs, the nodes that
            depend on the image may not be replaced.
        quantized: whether quantizers quantize; otherwise they return their inputs.
    """

    def __init__(self, gm: fx.GraphModule, *, quantized: bool) -> None:
        super().__init__(gm, keep_values=True)
        self.graph_module, self._quantized = gm, quantized
        self._nodes = {node.name: node for node in gm.graph.nodes}
        self._steps: dict[Block, list[_Step]] = {}

    def run_block(
        self,
        block: Block,
        values: Mapping[str, Tensor],
        *,
        overrides: Mapping[str, Override] | None = None,
        watch: Mapping[str, Callable[[tuple[Any, ...], Any], None]] | None = None,
        until: str | None = None,
    ) -> Values:
        """Runs a block.

        Args:
            block: a block of this graph, or of a graph whose nodes have the same names.
            values: values of the block's inputs by name, ``(B, …)`` each.
            overrides: functions that replace the computation of nodes, by name of the node.
            watch: functions called with the arguments and the result of a node, by its name.
            until: name of the last node to run.

        Returns:
            The block's outputs by name; where ``until`` was given, the outputs computed by then.
        """
        nodes = self._nodes
        self.env = {nodes[name]: value for name, value in values.items()}
        batch = len(next(iter(values.values())))
        overrides, watch = overrides or {}, watch or {}
        for node, dead in self._steps_of(block):
            self._provide(node, batch, overrides)
            self._compute(node, overrides)
            if node.name in watch:
                watch[node.name](self.fetch_args_kwargs_from_env(node)[0], self.env[node])
            if node.name == until:
                break
            for used in dead:
                self.env.pop(used, None)
        outputs = [nodes[node.name] for node in block.outputs]
        return {node.name: self.env[node] for node in outputs if node in self.env}

    def _steps_of(self, block: Block) -> list[_Step]:
        if block not in self._steps:
            nodes, data = self._nodes, {*block.inputs, *block.nodes} - {*block.outputs}
            dead = dead_after(block.nodes, data)
            self._steps[block] = [
                (nodes[node.name], [nodes[value.name] for value in dead.get(node, ())])
                for node in block.nodes
            ]
        return self._steps[block]

    def _provide(self, node: fx.Node, batch: int, overrides: Mapping[str, Override]) -> None:
        """Computes sizes and constants that a node reads."""
        for used in node.all_input_nodes:
            if used in self.env:
                continue
            if is_size(used):
                self.env[used] = size_for(used, batch)
                continue
            self._provide(used, batch, overrides)
            self._compute(used, overrides)

    def _compute(self, node: fx.Node, overrides: Mapping[str, Override]) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.name in overrides:
            self.env[node] = overrides[node.name](*args, **kwargs)
        elif node.op == "call_module":  # looked up at each call: quantizers are replaced
            quantizer = submodule(self.graph_module, node) if self._quantized else None
            self.env[node] = quantizer(*args) if quantizer is not None else args[0]
        else:
            self.env[node] = getattr(self, node.op)(node.target, args, kwargs)


class ActivationStore:
    """Values of all images at one cut, in memory within a budget, else in mapped files.

    Args:
        count: number of images.
        folder: folder for the files; None keeps all values in memory.
        memory_bytes: budget of this store.
    """

    def __init__(self, count: int, folder: Path | None = None, memory_bytes: int = 0) -> None:
        self._count, self._folder, self._bytes_left = count, folder, memory_bytes
        self._values: Values = {}
        self._files: list[Path] = []

    def put(self, start: int, values: Values) -> None:
        """Keeps the values of the images from ``start`` on."""
        for name, value in values.items():
            if name not in self._values:
                self._values[name] = self._allocate(name, value)
            self._values[name][start : start + len(value)] = value.detach()

    def _allocate(self, name: str, value: Tensor) -> Tensor:
        shape = (self._count, *value.shape[1:])
        size = self._count * value[0].numel() * value.element_size()
        if self._folder is None or size <= self._bytes_left:
            self._bytes_left -= size
            return torch.empty(shape, dtype=value.dtype)
        handle, path_name = tempfile.mkstemp(dir=self._folder, prefix=f"{name}-")
        os.close(handle)
        path = Path(path_name)
        self._files.append(path)
        flat = torch.from_file(
            str(path), shared=True, size=self._count * value[0].numel(), dtype=value.dtype
        )
        return flat.view(shape)

    def get(self, index: slice | Tensor, device: torch.device) -> Values:
        """The values of some images."""
        return {name: value[index].to(device) for name, value in self._values.items()}

    @property
    def bytes_per_image(self) -> int:
        """Size of the values of one image; 0 while the store is empty."""
        return sum(value[0].numel() * value.element_size() for value in self._values.values())

    def close(self) -> None:
        """Frees memory and files."""
        self._values = {}
        for path in self._files:
            path.unlink(missing_ok=True)
        self._files = []


def chunks(count: int) -> Iterator[slice]:
    """Slices of ``CHUNK`` images that cover all of them, in order."""
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


@dataclass(frozen=True)
class BlockContext:
    """A block with its inputs and the outputs of the float network, for all images.

    Attributes:
        block: block of the quantized graph.
        teacher: runs the float network.
        student: runs the quantized network.
        float_inputs: values at the start of the float block.
        quantized_inputs: values at the start of the quantized block, from the quantized blocks
            before it.
        float_outputs: values at the end of the float block.
        rest: the blocks after this block.
        count: number of images.
        device: device of the graph.
    """

    block: Block
    teacher: BlockRunner
    student: BlockRunner
    float_inputs: ActivationStore
    quantized_inputs: ActivationStore
    float_outputs: ActivationStore
    rest: tuple[Block, ...]
    count: int
    device: torch.device

    def chunks(self) -> Iterator[slice]:
        """Slices of the images in order, ``CHUNK`` images at a time."""
        return chunks(self.count)


class BlockwiseRunner:
    """Runs the float and the quantized network through the blocks of the graph.

    Args:
        teacher: the graph before its weights are changed, whose quantizers do nothing here: the
            float network; copied.
        images: ``(n, …)``.
        progress: show progress on stderr.
    """

    def __init__(self, teacher: fx.GraphModule, images: Tensor, *, progress: bool = False) -> None:
        self._teacher = copy.deepcopy(teacher).requires_grad_(False)
        self.images, self.progress = images, progress

    def on(self, images: Tensor) -> BlockwiseRunner:
        """The same float network on other images, ``(n, …)``."""
        runner = copy.copy(self)
        runner.images = images
        return runner

    def teacher(self) -> BlockRunner:
        """A runner of the float network."""
        return BlockRunner(self._teacher, quantized=False)

    @torch.no_grad()
    def walk(
        self, gm: fx.GraphModule, blocks: tuple[Block, ...], label: Label | None, memory_bytes: int
    ) -> Iterator[BlockContext]:
        """Yields the blocks of a graph in order; the caller may change each block it receives.

        Args:
            gm: the quantized graph: the nodes of the teacher and further constants.
            blocks: all blocks of the graph, in order.
            label: label of the progress; None shows no progress.
            memory_bytes: budget for values at cuts.
        """
        teacher = self.teacher()
        student = BlockRunner(gm, quantized=True)
        count = len(self.images)
        device = device_of(gm)
        share = memory_bytes // 4
        with tempfile.TemporaryDirectory(prefix="fxquant-") as name:
            folder = Path(name)
            placeholder = image_node(gm.graph).name
            float_inputs = ActivationStore(count, folder, share)
            float_inputs.put(0, {placeholder: self.images})
            quantized_inputs = float_inputs
            enabled = self.progress and label is not None
            shown = track(blocks, label=label or "", total=len(blocks), enabled=enabled)
            for number, block in enumerate(shown, 1):
                float_outputs = ActivationStore(count, folder, share)
                quantized_outputs = ActivationStore(count, folder, share)
                context = BlockContext(
                    block=block,
                    teacher=teacher,
                    student=student,
                    float_inputs=float_inputs,
                    quantized_inputs=quantized_inputs,
                    float_outputs=float_outputs,
                    rest=blocks[number:],
                    count=count,
                    device=device,
                )
                _run(teacher, context, float_inputs, float_outputs)
                yield context
                if block is not blocks[-1]:
                    _run(student, context, quantized_inputs, quantized_outputs)
                float_inputs.close()
                quantized_inputs.close()
                float_inputs, quantized_inputs = float_outputs, quantized_outputs


def _run(
    runner: BlockRunner, context: BlockContext, inputs: ActivationStore, outputs: ActivationStore
) -> None:
    for chunk in context.chunks():
        values = inputs.get(chunk, context.device)
        # Some models change their input in place.
        results = runner.run_block(context.block, {k: v.clone() for k, v in values.items()})
        outputs.put(chunk.start, tensors_of(context.block, results))


def tensors_of(block: Block, values: Mapping[str, Any]) -> Values:
    """The outputs of a block, tensor by tensor.

    Outputs of the ``output`` node are its float tensors with one entry per image, ``(B, …)``.
    """
    outputs: Values = {}
    for node in block.outputs:
        value = values[node.name]
        tensors = [value]
        if node.op == "output":
            tensors = [float_outputs(value)[i] for i in _by_image(node)]
        outputs |= {f"{node.name}.{i}" if i else node.name: x for i, x in enumerate(tensors)}
    return outputs


def embedding_names(gm: fx.GraphModule) -> frozenset[str]:
    """Names, as :func:`tensors_of` has them, of outputs ``(B, C)`` that are embeddings."""
    embeddings, output = EMBEDDINGS.get(gm) or frozenset[int](), gm.graph.output_node()
    return frozenset(
        f"{output.name}.{i}" if i else output.name
        for i, position in enumerate(_by_image(output))
        if position in embeddings
    )


def _by_image(output: fx.Node) -> list[int]:
    """Positions, among a model's float outputs, of those whose first axis is the batch."""
    batch = str(image_node(output.graph).meta["val"].shape[0])
    traced = fx.node.map_arg(output.args[0], lambda node: node.meta["val"])
    return [
        i
        for i, example in enumerate(float_outputs(traced))
        if example.ndim and str(example.shape[0]) == batch
    ]


def all_images(batches: Iterable[Tensor]) -> Tensor:
    """The images of all batches, ``(n, …)``, on the CPU."""
    return torch.cat([batch.cpu() for batch in batches])
