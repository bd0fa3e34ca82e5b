"""The preset ``best``: for each width the methods that measured best."""

from __future__ import annotations

from dataclasses import replace

from fxquant.config.allocation import Allocation, Budget
from fxquant.config.effort import Effort
from fxquant.config.recovery import BlockLoss, Compensation, Reconstruction, Scope, WeightTraining
from fxquant.config.scale_search import ScaleSearch
from fxquant.config.spec import MAX_KERNEL_BITS, Scheme, TensorSpec
from fxquant.config.validation import check_flags
from fxquant.config.vocabulary import Arg
from fxquant.errors import PolicyError, UnknownKeyError
from fxquant.policies.policy import Policy, Rule
from fxquant.policies.presets.plain import w8a8
from fxquant.policies.presets.searched import ptq4vit
from fxquant.policies.presets.shared_rules import elementwise_rules, end_rules
from fxquant.utils.suggest import did_you_mean

_END_BITS = 8
# Rows of each product for the search: half as many as in other presets, for speed.
_ROWS = 256
# Trains scales, zero points and biases of the whole network and keeps the weights' codes from GPTQ:
# trained weights would overfit the few images. None of these is held out, and more are augmented
# from them. The bound takes about two minutes on two cores of an AVX512 server.
_SECONDS = Reconstruction(
    scope=Scope.NETWORK,
    weights=WeightTraining.SCALES,
    block_loss=BlockLoss.MSE,
    iterations=300,
    scale_rate=2e-3,
    drop=0.0,
    held_out=0.0,
    augment=True,
    max_macs=1e13,
)
# Hundreds of images suffice to train weights too: 1,000 steps of a small network, 400 of DeiT-S.
_MINUTES = replace(
    _SECONDS,
    weights=WeightTraining.STRAIGHT_THROUGH,
    weight_rate=3e-3,
    iterations=1000,
    held_out=0.125,
    max_macs=2.5e14,
)
_TRAINING = {
    Effort.SECONDS: _SECONDS,
    Effort.MINUTES: _MINUTES,
    Effort.HOURS: replace(_MINUTES, iterations=10_000, max_macs=None),
}
# For maps, tokens and embeddings. Trained as a whole, towards such outputs, a network fits its few
# images and loses on others; trained block by block, it gains on others too.
_DENSE_SECONDS = Reconstruction(
    scope=Scope.BLOCK,
    weights=WeightTraining.STRAIGHT_THROUGH,
    block_loss=BlockLoss.MSE,
    iterations=300,
    batch=8,
    weight_rate=5e-3,
    scale_rate=5e-4,
    drop=0.0,
    max_macs=6.5e12,
)
_DENSE_TRAINING = {
    Effort.SECONDS: _DENSE_SECONDS,
    Effort.MINUTES: replace(_DENSE_SECONDS, iterations=1000, images=256, max_macs=3e13),
    Effort.HOURS: replace(_DENSE_SECONDS, iterations=10_000, images=256, max_macs=None),
}
# For GPTQ: where tokens are merged, 32 images have fewer rows than a wide layer has columns.
_IMAGES = 128


def best(
    weight_bits: int = 8,
    act_bits: int = 8,
    effort: Effort | str = Effort.SECONDS,
    *,
    end_bits: int | None = None,
    budget: Budget | None = None,
    full: bool = False,
) -> Policy:
    """Combination of methods that measured best on a pretrained transformer and example models.

    At all widths softmax is divided behind its product, keys and values are centred, and residual
    streams, heads and inputs behind activation functions are rotated where that lowers the noise
    of products. At 8 bits it is otherwise :func:`w8a8` with twin quantizers behind softmax, and
    nothing is searched or trained. Below 8 bits it has the search of :func:`mptq_vit` without
    smoothing, weights rounded by GPTQ (:class:`fxquant.Compensation`), and the first and last
    linears and convolutions at 8 bits. Then it trains as far as the effort allows
    (:class:`fxquant.Reconstruction`): scales and biases of the whole network where outputs are
    logits, weights block by block where they are maps, tokens or embeddings. With effort
    ``minutes`` and ``hours`` weights are also moved by the ridge before rounding, and trained for
    logits too. ``benchmarks/accuracy.py`` and ``benchmarks/real.py`` measure it.

    Args:
        weight_bits: width of weights, symmetric per output channel.
        act_bits: width of activations.
        effort: ``seconds`` for 32 images, ``minutes`` or ``hours`` for hundreds; without effect at
            8 bits. The first two bound the multiplications of the training, so that large networks
            get fewer steps.
        end_bits: least width of the weights of the first and last layers, and of the last layers'
            inputs (:func:`fxquant.policies.end_rules`); None is 8, and 2 gives these layers the
            width of all others.
        budget: budget of mixed precision, chosen exactly, instead of fixed widths; rotations are
            then tried at ``weight_bits`` and ``act_bits``.
        full: also quantize the inputs of norms, softmax, activation functions and additions to 8
            bits.

    Raises:
        BitWidthError: a width is outside 2..16.
        UnknownKeyError: the effort is unknown.
        PolicyError: ``budget`` is not a Budget, ``full`` not a boolean, or both ``budget`` and
            ``end_bits`` are set.
    """
    check_flags(full=full)
    _check(effort, (weight_bits, act_bits), end_bits, budget)
    wide = end_rules(_END_BITS if end_bits is None else end_bits)
    widths = f"w{weight_bits}a{act_bits}" if budget is None else "mixed"
    suffix = "_full" if full else ""
    if weight_bits == act_bits == MAX_KERNEL_BITS and budget is None:
        plain = w8a8(full=True) if full else _eight_bits()
        description = f"our own pick: {plain.description}"
        return replace(plain, name=f"best_{widths}{suffix}", description=description)
    base = ptq4vit(weight_bits, act_bits, twin=act_bits <= MAX_KERNEL_BITS)
    ends: list[Rule] = []
    for rule in () if budget is not None else wide:
        bits = weight_bits if rule.arg is Arg.WEIGHT else act_bits
        if rule.spec is not None and rule.spec.bits > bits:
            ends.append(rule)
    if end_bits not in (None, _END_BITS):
        suffix = f"_ends{end_bits}{suffix}"
    image = [rule for rule in base.rules if rule.fed_by == "image"]
    base_rules = [rule for rule in base.rules if rule not in image]
    return replace(
        _prepared(base, full=full),
        name=f"best_{widths}_{effort}{suffix}",
        rules=(*(elementwise_rules() if full else ()), *image, *ends, *base_rules),
        search=ScaleSearch(search_region_ratio=act_bits <= MAX_KERNEL_BITS, rows=_ROWS),
        description="our own pick: rotated where that helps, scales searched, weights rounded by "
        "columns, trained",
        allocation=None if budget is None else Allocation(budget=budget),
        compensation=Compensation(images=_IMAGES, ridge=effort != Effort.SECONDS),
        reconstruction=_TRAINING[Effort(effort)],
        dense_reconstruction=_DENSE_TRAINING[Effort(effort)],
    )


def _eight_bits() -> Policy:
    """Observed ranges, without a search or training: neither gains at 8 bits."""
    twin = Rule(fed_by="softmax", spec=TensorSpec(scheme=Scheme.TWIN_UNIFORM), optional=True)
    return replace(
        _prepared(w8a8(), full=False).with_rules(twin),
        description="8-bit weights and activations, twin quantizers behind softmax, rotated where "
        "that helps",
    )


def _prepared(policy: Policy, *, full: bool) -> Policy:
    """The policy with changes of the float network that cost little time in a runtime, or none.

    Of rotations those are made that lower the noise of products. With ``full`` nothing may be
    computed in float, as a rotation behind an activation function and divided softmax are.
    """
    return replace(
        policy,
        rotate=True,
        rotate_hidden=not full,
        trial_rotations=True,
        centre_heads=True,
        defer_softmax=not full,
    )


def _check(
    effort: Effort | str, widths: tuple[int, int], end_bits: int | None, budget: Budget | None
) -> None:
    """Checks the options of :func:`best`, which lists the errors."""
    if effort not in list(Effort):
        raise UnknownKeyError(
            f"effort {effort!r} is unknown{did_you_mean(str(effort), list(Effort))}; one of "
            f"{', '.join(Effort)}",
            got=effort,
            expected=tuple(Effort),
        )
    for bits in widths:
        TensorSpec(bits=bits)  # checks the width
    if budget is not None and end_bits is not None:
        raise PolicyError(
            "set either end_bits or budget: a budget chooses the width of each edge",
            got=(end_bits, budget),
            expected="end_bits or budget",
        )
