"""The rows of the ablation: policies by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fxquant import (
    Allocation,
    Budget,
    Compensation,
    Policy,
    Rule,
    TensorSpec,
    policies,
)
from fxquant.config.allocation import Method
from fxquant.config.recovery import WeightTraining
from fxquant.config.scale_search import GradientLoss, Metric, ScaleSearch
from fxquant.config.spec import Scheme
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.policies import Effort

# Widths at which mixed widths of the same mean are measured as well.
MIXED_WIDTHS = (5, 4)
# Far fewer steps than the paper's 6,000 and 2,000; all rows of AIQViT have the same number.
_SHORT_TRAINING = {"iterations": 150, "rank_iterations": 50, "batch": 16}


def methods(bits: int) -> dict[str, Policy]:
    """The steps of the ablation, all weights and activations at one width."""
    base, whole = policies.base_ptq(bits, bits), policies.ptq4vit(bits, bits)
    assert base.search is not None and whole.search is not None
    by_cosine = replace(whole.search, metric=Metric.COSINE)
    by_row = replace(whole.search, metric=Metric.HESSIAN, loss=GradientLoss.ARGMAX)
    uniform = policies.ptq4vit(bits, bits, twin=False)
    symmetric = TensorSpec(bits=bits, symmetric=True)
    skewed = tuple(Rule(fed_by=name, spec=symmetric) for name in ("softmax", "gelu"))
    steps = {
        "min-max": policies.minmax(bits, bits),
        "base PTQ": base,
        "+ rounds": replace(base, search=by_cosine),
        "+ Hessian, symmetric": uniform.with_rules(*skewed),
        "+ Hessian": uniform,
        "+ twin": replace(whole, search=base.search),
        "+ both": whole,
        "+ both, RepQ": replace(whole, reparameterize=True),
        "+ both, row by row": replace(whole, search=by_row),
        "+ both, as published": replace(as_published(whole, symmetric), search=by_row),
        "+ both, OPT-m": replace(whole, search=replace(whole.search, search_region_ratio=True)),
        "MPTQ-ViT": policies.mptq_vit(bits, bits),
        **compensated(bits),
        **attention(whole, bits),
        **aiqvit(bits),
    }
    if bits < 8:
        image = [rule for rule in whole.rules if rule.fed_by == "image"]
        wide = (*image, *policies.end_rules())
        steps |= {"+ both, ends at 8 bits": whole.with_rules(*wide), **tiers(bits)}
    if bits == 8:
        return {**steps, "w8a8": policies.w8a8(), "w8a8_full": policies.w8a8(full=True)}
    return {**steps, **mixed(bits)} if bits in MIXED_WIDTHS else steps


def as_published(whole: Policy, symmetric: TensorSpec) -> Policy:
    """PTQ4ViT with the paper's quantizers: symmetric per tensor, except for the image and twins."""
    twins = [r for r in whole.rules if r.spec and r.spec.scheme is Scheme.TWIN_UNIFORM]
    image = [r for r in whole.rules if r.fed_by == "image"]
    by_head = [r for r in whole.rules if r.op is OpKind.MATMUL]
    others = (Rule(arg=arg, spec=symmetric) for arg in (Arg.WEIGHT, Arg.INPUT))
    return replace(whole, rules=(*twins, *image, *by_head, *others))


def attention(base: Policy, bits: int) -> dict[str, Policy]:
    """The base with other quantizers than twins after softmax."""
    schemes = {
        "uniform": Scheme.UNIFORM,
        "focusing": Scheme.DYNAMIC_FOCUSING,
        "log2": Scheme.LOG2,
        "AdaLog": Scheme.ADALOG,
    }
    return {
        f"+ both, {name}": base.with_rules(
            Rule(fed_by="softmax", spec=TensorSpec(bits=bits, scheme=scheme))
        )
        for name, scheme in schemes.items()
    }


def compensated(bits: int) -> dict[str, Policy]:
    """Policies that round weights column by column, some after the ridge solution."""
    plain, whole = (
        policies.ptq4vit(bits, bits, search=ScaleSearch(search_region_ratio=m))
        for m in (False, True)
    )
    gptq = Compensation()
    return {
        "+ both, by columns": replace(plain, compensation=gptq),
        "+ OPT-m, by columns": replace(whole, compensation=gptq),
        "+ OPT-m, ridge": replace(whole, compensation=replace(gptq, ridge=True)),
        "MPTQ-ViT, by columns": replace(policies.mptq_vit(bits, bits), compensation=gptq),
    }


def mixed(bits: int) -> dict[str, Policy]:
    """Policies of 3 to 8 bits with a given mean, over all edges or over each kind of operand."""
    budget, apart = Budget(mean_bits=bits), Budget(mean_weight_bits=bits, mean_act_bits=bits)
    uniform, whole = policies.ptq4vit(twin=False), policies.ptq4vit()
    exact, greedy = (Allocation(budget=budget, method=method) for method in Method)
    return {
        "+ Hessian, mixed": replace(uniform, allocation=exact),
        "+ Hessian, mixed greedily": replace(uniform, allocation=greedy),
        "+ both, mixed": replace(whole, allocation=exact),
        "MPTQ-ViT, mixed": policies.mptq_vit(budget=budget),
        **{
            f"best, {effort}, {name}": policies.best(bits, bits, effort, budget=limits)
            for effort in Effort
            for name, limits in (("mixed", budget), ("mixed apart", apart))
        },
    }


def tiers(bits: int) -> dict[str, Policy]:
    """Variants of ``best``: untrained, with narrow ends, by effort, with an operand at 8 bits."""
    found = {
        "best, untrained": replace(policies.best(bits, bits), reconstruction=None),
        "best, ends alike": policies.best(bits, bits, end_bits=2),
    }
    for effort in Effort:
        whole = policies.best(bits, bits, effort)
        assert whole.compensation is not None and whole.reconstruction is not None
        no_ridge = replace(whole.compensation, ridge=False)
        codes_stay = replace(whole.reconstruction, weights=WeightTraining.SCALES)
        found[f"best, {effort}"] = whole
        if effort is not Effort.SECONDS:
            found[f"best, {effort}, no ridge"] = replace(whole, compensation=no_ridge)
            found[f"best, {effort}, codes stay"] = replace(whole, reconstruction=codes_stay)
        found[f"best, {effort}, weights at 8 bits"] = policies.best(8, bits, effort)
        found[f"best, {effort}, activations at 8 bits"] = policies.best(bits, 8, effort)
    return found


def aiqvit(bits: int) -> dict[str, Policy]:
    """AIQViT (arXiv 2502.04628), with its parts added one after the other."""
    whole = policies.aiqvit(bits, bits).reconstruction
    assert whole is not None
    make = partial(policies.aiqvit, bits, bits, reconstruction=replace(whole, **_SHORT_TRAINING))
    return {
        "AIQViT, vanilla": make(low_rank=False, focusing=False, curriculum=False),
        "AIQViT, low rank": make(focusing=False, curriculum=False),
        "AIQViT, focusing": make(low_rank=False, curriculum=False),
        "AIQViT, curriculum": make(low_rank=False, focusing=False),
        "AIQViT": make(),
    }


_SOFTMAX_FLOAT = Rule(fed_by="softmax", spec=None)
_ALL_ROTATED = {"defer_softmax": True, "rotate": True, "rotate_hidden": True}
# Methods of real.py: functions of the widths of weights and activations.
REAL_METHODS: dict[str, Callable[[int, int], Policy]] = {
    "min-max": policies.minmax,
    "min-max, softmax float": lambda w, a: policies.minmax(w, a).with_rules(_SOFTMAX_FLOAT),
    "min-max, softmax float + rotated": lambda w, a: policies.minmax(w, a, rotate=True).with_rules(
        _SOFTMAX_FLOAT
    ),
    "min-max + deferred": lambda w, a: replace(policies.minmax(w, a), defer_softmax=True),
    "min-max + rotated": lambda w, a: policies.minmax(w, a, rotate=True),
    "min-max + deferred + rotated": lambda w, a: replace(
        policies.minmax(w, a, rotate=True), defer_softmax=True
    ),
    "min-max + deferred + all rotated": lambda w, a: replace(policies.minmax(w, a), **_ALL_ROTATED),
    "min-max, twins + deferred + all rotated": lambda w, a: replace(
        policies.ptq4vit(w, a), search=None, **_ALL_ROTATED
    ),
    "w8a8": lambda w, a: policies.w8a8(),
    "base PTQ": policies.base_ptq,
    "PTQ4ViT": policies.ptq4vit,
    "PTQ4ViT + deferred": lambda w, a: replace(policies.ptq4vit(w, a), defer_softmax=True),
    "PTQ4ViT + rotated": lambda w, a: policies.ptq4vit(w, a, rotate=True),
    "PTQ4ViT + deferred + rotated": lambda w, a: replace(
        policies.ptq4vit(w, a, rotate=True), defer_softmax=True
    ),
    "PTQ4ViT + deferred + all rotated": lambda w, a: replace(
        policies.ptq4vit(w, a), **_ALL_ROTATED
    ),
    "MPTQ-ViT": policies.mptq_vit,
    "best, seconds": lambda w, a: policies.best(w, a, "seconds"),
    "best, minutes": lambda w, a: policies.best(w, a, "minutes"),
}
