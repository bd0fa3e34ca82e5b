"""Policies: ordered rules for the quantization of edges, and the steps after it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from fxquant.config.allocation import Allocation
from fxquant.config.low_rank import LowRank
from fxquant.config.recovery import Compensation, Reconstruction
from fxquant.config.scale_search import GRADIENT_METRICS, Metric, ScaleSearch
from fxquant.config.spec import TensorSpec
from fxquant.config.validation import check_flag, parse_field
from fxquant.config.vocabulary import Arg, End, OpKind
from fxquant.errors import PolicyError, UnknownKeyError
from fxquant.graph.dialect import PRODUCER_NAMES
from fxquant.graph.edges import Edge, fed_by
from fxquant.graph.network_ends import is_first_or_last_product
from fxquant.utils.suggest import did_you_mean

_CHANGED = " (changed)"
# Fields of a Policy that turn a step on, in the order of the steps.
FLAGS = (
    "rotate",
    "rotate_hidden",
    "trial_rotations",
    "centre_heads",
    "reparameterize",
    "defer_softmax",
    "smooth",
    "bias_correction",
)
_PARTS = {
    "search": ScaleSearch,
    "allocation": Allocation,
    "low_rank": LowRank,
    "compensation": Compensation,
    "reconstruction": Reconstruction,
    "dense_reconstruction": Reconstruction,
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Quantization of the edges that match all of the rule's conditions.

    Attributes:
        spec: quantization of the edges; None keeps them float.
        path: regular expression that the whole module path must match.
        op: kind of the consuming operation; None matches any product. Norms, softmax, activation
            functions and additions are matched only by rules that name them.
        arg: input of the consuming operation.
        fed_by: operation that computed the values, data movement skipped: ``softmax``, ``gelu``,
            ``layer_norm``, ``image`` … (``graph.PRODUCER_NAMES``).
        end: ``first`` for products with no product before them, ``last`` for products with none
            after; both are often kept at 8 bits (BRECQ, arXiv 2102.05426, section 4).
        optional: a rule that matches nothing is an error unless it is optional.
        pinned: keep the edges at the width of ``spec`` in mixed precision
            (:class:`fxquant.Allocation`).
    """

    spec: TensorSpec | None
    path: str = ".*"
    op: OpKind | None = None
    arg: Arg | None = None
    fed_by: str | None = None
    end: End | None = None
    optional: bool = False
    pinned: bool = False

    def __str__(self) -> str:
        """Conditions of the rule in the notation of policy files."""
        names = ("path", "op", "arg", "fed_by", "end")
        values = {name: getattr(self, name) for name in names}
        conditions = [f"{k}: {v}" for k, v in values.items() if v not in (None, ".*")]
        return ", ".join(conditions) or "any product"

    def __post_init__(self) -> None:
        """Checks the conditions.

        Raises:
            PolicyError: ``spec`` is not a TensorSpec, ``path`` not a regular expression, or
                ``optional`` or ``pinned`` not a boolean.
            UnknownKeyError: ``fed_by`` names no producer, or ``op``, ``arg`` or ``end`` is unknown.
        """
        if self.spec is not None and not isinstance(self.spec, TensorSpec):
            raise PolicyError(
                f"spec must be a TensorSpec, or None to keep edges float, got {self.spec!r:.80}",
                got=self.spec,
                expected=(TensorSpec, None),
            )
        if self.op is not None:
            parse_field(self, "op", OpKind)
        if self.arg is not None:
            parse_field(self, "arg", Arg)
        if self.end is not None:
            parse_field(self, "end", End)
        check_flag(self, "optional")
        check_flag(self, "pinned")
        if not isinstance(self.path, str):
            raise PolicyError(
                f"path must be a regular expression as text, got {self.path!r}",
                got=self.path,
                expected=str,
            )
        try:
            re.compile(self.path)
        except re.error as error:
            raise PolicyError(
                f"path {self.path!r} is not a regular expression: {error}",
                got=self.path,
                expected="a regular expression",
            ) from error
        if self.fed_by is not None and self.fed_by not in list(PRODUCER_NAMES):
            raise UnknownKeyError(
                f"fed_by {self.fed_by!r} is unknown"
                f"{did_you_mean(str(self.fed_by), PRODUCER_NAMES)}; one of "
                f"{', '.join(sorted(PRODUCER_NAMES))}",
                got=self.fed_by,
                expected=tuple(sorted(PRODUCER_NAMES)),
            )

    def matches(self, edge: Edge) -> bool:
        """Whether all conditions of the rule hold for ``edge``."""
        return (
            (edge.kind.is_product if self.op is None else self.op is edge.kind)
            and (self.arg is None or self.arg is edge.arg)
            and re.fullmatch(self.path, edge.path) is not None
            and (self.fed_by is None or self.fed_by == fed_by(edge))
            and (self.end is None or is_first_or_last_product(edge.node, self.end))
        )


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A complete recipe. The first rule that matches an edge decides; no match leaves it float.

    Attributes:
        name: shown in reports.
        rules: in order of precedence.
        description: one sentence for ``fxquant policies``.
        search: search of scales by the output error of products; None keeps the scales that the
            observers fitted.
        rotate: turn residual streams and heads by orthogonal matrices first, folded into the
            weights around them, which spreads outlying channels over all channels (QuaRot, arXiv
            2404.00456; ours keeps LayerNorms).
        rotate_hidden: turn what linears read behind activation functions by a block-diagonal
            Hadamard matrix, which a float linear computes at run time
            (:class:`fxquant.passes.RotateHidden`).
        trial_rotations: make the rotations of ``rotate``, and then those of ``rotate_hidden``, only
            where they lower the noise of products enough, quantized on trial with ranges fitted to
            the first calibration batch.
        centre_heads: shift the channels of keys and values of attention so that each lies around
            zero, which costs nothing (:class:`fxquant.passes.CentreHeads`).
        defer_softmax: divide softmax by its row sums behind the product that reads it, so that
            one scale fits every row (:class:`fxquant.passes.DeferSoftmax`).
        reparameterize: move the channels behind each LayerNorm onto one range first, folded into
            the norm's weights and those of the linears it feeds (RepQ-ViT, arXiv 2212.08254).
        smooth: shift and scale channels behind norms and of attention values where that lowers the
            error of products, folded into the weights around them (SQ-b, arXiv 2401.14895).
        bias_correction: subtract the mean output error of the rounded weights from the biases
            (arXiv 2111.12293, section 5.3).
        low_rank: branches parallel to linears that add the rounding error of their weights back
            (LQER, arXiv 2402.02446), kept where they lower the output error.
        allocation: choice of a width for each edge within a budget; None keeps the rules' widths.
        compensation: closed-form correction of weights; None keeps the weights.
        reconstruction: training of blocks towards the float ones, the last step; None trains
            nothing.
        dense_reconstruction: training instead of ``reconstruction`` where no output is logits but
            all are maps, tokens or embeddings; None is ``reconstruction`` for these too.
    """

    name: str
    rules: tuple[Rule, ...] = field(default=())
    description: str = ""
    search: ScaleSearch | None = None
    rotate: bool = False
    rotate_hidden: bool = False
    trial_rotations: bool = False
    centre_heads: bool = False
    defer_softmax: bool = False
    reparameterize: bool = False
    smooth: bool = False
    bias_correction: bool = False
    low_rank: LowRank | None = None
    allocation: Allocation | None = None
    compensation: Compensation | None = None
    reconstruction: Reconstruction | None = None
    dense_reconstruction: Reconstruction | None = None

    def __post_init__(self) -> None:
        """Checks types and combinations.

        Raises:
            PolicyError: there is no rule, a value has the wrong type, or ``low_rank`` meets
                ``compensation`` or ``reconstruction``.
        """
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise PolicyError(
                    f"{name} must be {kind.__name__} or None, got {value!r:.80}",
                    got=value,
                    expected=(kind, None),
                )
        for name in FLAGS:
            check_flag(self, name)
        if not isinstance(self.name, str) or not isinstance(self.description, str):
            raise PolicyError(
                f"name and description must be text, got {self.name!r} and {self.description!r}",
                got=(self.name, self.description),
                expected=str,
            )
        if not isinstance(self.rules, tuple | list):
            raise PolicyError(
                f"rules must be a tuple of Rule, got {self.rules!r:.80}",
                got=self.rules,
                expected="a tuple of Rule",
            )
        object.__setattr__(self, "rules", tuple(self.rules))
        for i, rule in enumerate(self.rules):
            if not isinstance(rule, Rule):
                raise PolicyError(
                    f"rule {i + 1} must be a Rule, got {rule!r:.80}", got=rule, expected=Rule
                )
        if not self.rules:
            raise PolicyError(f"policy {self.name!r} has no rules, so it would quantize nothing")
        if self.low_rank is not None and self.recovers:
            raise PolicyError(
                "low_rank adds branches, which compensation and reconstruction do not support: "
                "remove either (reconstruction has low-rank factors of its own)",
                got=self.low_rank,
                expected=None,
            )

    @property
    def recovers(self) -> bool:
        """Whether weights are corrected or trained after scales are fixed; that needs images."""
        return self.compensation is not None or self.trains

    @property
    def trains(self) -> bool:
        """Whether blocks are trained for some outputs."""
        return self.reconstruction is not None or self.dense_reconstruction is not None

    @property
    def reads_images_twice(self) -> bool:
        """Whether the calibration images are needed more than once."""
        return self.smooth or self.reparameterize or self.recovers

    @property
    def compares_outputs(self) -> bool:
        """Whether a step measures or differentiates a loss of the model's outputs."""
        samples = self.samples
        gradients = samples is not None and samples.metric in GRADIENT_METRICS
        return gradients or self.smooth or self.trains

    @property
    def samples(self) -> ScaleSearch | None:
        """Options for sampling rows of products; None where no step needs rows.

        Estimates of sensitivity need gradients, whichever metric the search uses.
        """
        if self.allocation is not None and (
            self.search is None or self.search.metric not in GRADIENT_METRICS
        ):
            return replace(self.search or ScaleSearch(), metric=Metric.FISHER)
        branches = self.low_rank is not None
        if self.search is None and (self.bias_correction or self.smooth or branches):
            return ScaleSearch(metric=Metric.MSE)  # rows without gradients
        return self.search

    def for_outputs(self, *, logits: bool) -> Policy:
        """The policy for a network with outputs that are logits, or without: one training."""
        if logits or self.dense_reconstruction is None:
            return replace(self, dense_reconstruction=None)
        return replace(self, reconstruction=self.dense_reconstruction, dense_reconstruction=None)

    def with_rules(self, *rules: Rule) -> Policy:
        """A copy with ``rules`` before the policy's own rules, its name marked as changed."""
        name = self.name if self.name.endswith(_CHANGED) else self.name + _CHANGED
        return replace(self, name=name, rules=(*rules, *self.rules))
