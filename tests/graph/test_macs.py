"""How much a graph computes for one image."""

from __future__ import annotations

import math

import pytest

from fxquant import testing
from fxquant.config.scale_search import ScaleSearch
from fxquant.config.vocabulary import OpKind
from fxquant.graph.dialect import op_kind
from fxquant.graph.macs import MacCounter
from fxquant.graph.nodes import get_parameter, operand
from fxquant.policies.policy import Rule
from fxquant.smoothing import choose
from fxquant.smoothing.fold_sites import Site, linear_sites, norm_sites
from fxquant.testing import images, seeded, tokens
from tests.helpers.stages import FOUR, annotated, canonical


@pytest.mark.parametrize("batch", [1, 3])
def test_multiplications_are_those_of_one_image(batch: int) -> None:
    gm = canonical(seeded(testing.Block()), tokens(batch))
    (token_count, dim), work = tokens(batch).shape[1:], MacCounter(gm)
    for node in gm.graph.nodes:
        if op_kind(node) is OpKind.LINEAR:
            weight = get_parameter(gm, operand(node, 1))
            assert work.macs(node) == token_count * weight.numel()
        elif op_kind(node) is OpKind.MATMUL:
            assert work.macs(node) == token_count**2 * dim  # of all heads together


def test_multiplications_of_a_convolution() -> None:
    gm = canonical(seeded(testing.ConvNorm()), images(2))
    (conv,) = (node for node in gm.graph.nodes if op_kind(node) is OpKind.CONV)
    weight = get_parameter(gm, operand(conv, 1))
    places = math.prod(conv.meta["val"].shape[2:])
    assert MacCounter(gm).macs(conv) == places * weight.numel()


def test_the_rest_is_run_once_for_each_start() -> None:
    gm = canonical(seeded(testing.Block()), tokens())
    work, nodes = MacCounter(gm), list(gm.graph.nodes)
    products = [node for node in nodes if op_kind(node) is not None]
    whole = sum(map(work.macs, products))
    assert work.total == work.macs_after([nodes[0]]) == whole
    assert work.macs_after([nodes[0], products[-1]]) == whole + work.macs(products[-1])
    assert work.macs_after([]) == work.macs_after([nodes[-1]]) == 0


@pytest.mark.parametrize(("images_worth", "count"), [(0, 4), (10.5, 10), (1e9, 32)])
def test_large_networks_are_smoothed_by_fewer_images(
    monkeypatch: pytest.MonkeyPatch, images_worth: float, count: int
) -> None:
    found: list[int] = []

    class Watched(choose.NetworkLoss):  # type: ignore[name-defined, misc]
        def __init__(self, gm, images, loss) -> None:  # type: ignore[no-untyped-def]
            found.append(len(images))
            super().__init__(gm, images, loss)

    gm, _ = annotated(Rule(spec=FOUR), model=testing.Block(), x=tokens(40))
    sources = [
        site.source for _, site in (*norm_sites(gm), *linear_sites(gm)) if isinstance(site, Site)
    ]
    limit = images_worth * 5 * MacCounter(gm).macs_after(sources)
    monkeypatch.setattr(choose, "_MAX_MACS", limit)
    monkeypatch.setattr(choose, "NetworkLoss", Watched)
    choose.choose_smoothing(gm, [(tokens(40), None)], ScaleSearch(rows=32))
    assert found == [count]
