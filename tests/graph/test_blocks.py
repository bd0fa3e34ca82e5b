"""Blocks by structure, and both networks side by side over them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant import policies
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.demo.models import build
from fxquant.graph.blocks import find_blocks, waves
from fxquant.graph.dialect import op_kind
from fxquant.graph.sizes import is_size, size_for
from fxquant.policies.policy import Rule
from fxquant.reconstruction.blockwise import ActivationStore, BlockRunner, BlockwiseRunner
from fxquant.testing import DIM, relative_error, tokens
from tests.helpers import stages
from tests.helpers.stages import EIGHT, WEIGHT, canonical
from tests.helpers.towers import Stack


class Woven(nn.Module):
    """Two values are read to the end, so that it can be cut nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + x.sin()) * (self.b(x) - x.cos())


def frozen(model: nn.Module) -> fx.GraphModule:
    return stages.frozen(Rule(arg=Arg.WEIGHT, spec=WEIGHT), Rule(spec=EIGHT), model=model)


def test_an_attention_and_the_mlp_behind_it_are_one_block() -> None:
    blocks = find_blocks(canonical(Stack(), tokens()))
    assert [block.name for block in blocks] == ["stem", "one", "two", "head"]
    kinds = [op_kind(node) for node in blocks[1].products]
    assert kinds.count(OpKind.MATMUL) == 2
    assert kinds.count(OpKind.LINEAR) == 6


def test_blocks_are_the_same_when_all_between_products_is_quantized() -> None:
    def names(rules: tuple[Rule, ...]) -> list[str]:
        gm = stages.frozen(*rules, model=Stack())
        return [block.name for block in find_blocks(gm)]

    for full in (False, True):
        assert names(policies.w8a8(full=full).rules) == ["stem", "one", "two", "head"]


def test_every_node_that_depends_on_the_image_is_in_one_block() -> None:
    gm = frozen(Stack())
    blocks = find_blocks(gm)
    inside = [node for block in blocks for node in block.nodes]
    assert len(inside) == len(set(inside))
    products = [node for node in gm.graph.nodes if op_kind(node) is not None]
    assert set(products) <= set(inside)
    for one, two in pairwise(blocks):
        assert one.outputs == two.inputs


def test_a_graph_that_can_be_cut_nowhere_is_one_block() -> None:
    (block,) = find_blocks(canonical(Woven(), tokens()))
    assert len(block.products) == 2


@pytest.mark.parametrize(("name", "count"), [("glyph_vit", 6), ("glyph_swin", 8)])
def test_shipped_models_have_as_many_blocks_as_they_say(name: str, count: int) -> None:
    gm = canonical(build(name), torch.zeros(2, 3, 64, 64), seed=False)
    softmaxes = [
        sum(node.target is torch.ops.aten.softmax.int for node in block.nodes)
        for block in find_blocks(gm)
    ]
    assert softmaxes.count(1) == count
    assert max(softmaxes) == 1


def test_waves_keep_what_reads_another_for_later() -> None:
    (_, block, *_) = find_blocks(canonical(Stack(), tokens()))
    linears = {node for node in block.products if op_kind(node) is OpKind.LINEAR}
    found = [[node.name for node in wave] for wave in waves(block.nodes, linears)]
    assert [len(wave) for wave in found] == [3, 1, 1, 1]


def test_sizes_follow_the_batch() -> None:
    gm = canonical(build("glyph_vit"), torch.zeros(2, 3, 64, 64), seed=False)
    sizes = [node for node in gm.graph.nodes if is_size(node)]
    assert sizes
    assert {size_for(node, 7) for node in sizes} == {7}


def test_both_walk_as_the_graph_runs() -> None:
    model = Stack()
    gm, x = frozen(model), tokens(11)
    walk = BlockwiseRunner(gm, x).walk(gm, find_blocks(gm), "walk", 1 << 20)
    for context in walk:
        last = context
        target = context.float_outputs.get(slice(None), x.device)
        given = context.quantized_inputs.get(slice(None), x.device)
    (exact,) = target.values()
    assert relative_error(exact, model(x)) < 1e-5
    (found,) = BlockRunner(gm, quantized=True).run_block(last.block, given).values()
    assert torch.equal(found[0] if isinstance(found, tuple) else found, gm(x))


def test_what_is_changed_at_a_block_is_seen_behind_it() -> None:
    gm, x = frozen(Stack()), tokens()
    expected = None
    for context in BlockwiseRunner(gm, x).walk(gm, find_blocks(gm), "walk", 1 << 20):
        if context.block.name == "stem":
            with torch.no_grad():
                gm.get_parameter("stem.weight").mul_(2)
            expected = gm(x)
        given, target = (
            s.get(slice(None), x.device) for s in (context.quantized_inputs, context.float_outputs)
        )
    assert expected is not None
    (found,) = BlockRunner(gm, quantized=True).run_block(context.block, given).values()
    assert torch.equal(found[0] if isinstance(found, tuple) else found, expected)
    (exact,) = target.values()
    assert relative_error(expected, exact) > 0.05


def test_values_beyond_the_budget_go_to_files(tmp_path: Path) -> None:
    values = {"a": torch.randn(6, 4), "b": torch.randn(6, 50)}
    store = ActivationStore(6, tmp_path, 6 * 4 * 4)
    for start in (0, 3):
        store.put(start, {name: value[start : start + 3] for name, value in values.items()})
    assert len(list(tmp_path.iterdir())) == 1
    index = torch.tensor([4, 0])
    for name, value in store.get(index, torch.device("cpu")).items():
        assert torch.equal(value, values[name][index])
    store.close()
    assert not list(tmp_path.iterdir())
