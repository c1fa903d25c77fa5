"""The arguments of a loss: which weighting they name, and whether they fit together."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wmtp import checks, label_checks
from wmtp.exact_zero import product
from wmtp.kinds import check_choice, check_flag, check_same_device, is_readable
from wmtp.labels import Targets
from wmtp.numerics import PLAIN, Numerics, check_vocab_size
from wmtp.once import warn_once
from wmtp.reduction import Terms, may_be_negative, terms_of
from wmtp.sharded import local_parts
from wmtp.weightings import Decay, Excess, Given, KeepTop, Product, Uniform, Weighting
from wmtp.weightings.base import as_tensor, field_of, fields_of, with_field_values


def chosen_weighting(
    head_weights: Tensor | None,
    weighting: Weighting | None,
    *,
    ref_ce: Tensor | None,
    ref_logits: Tensor | None,
    temperature: Tensor | float,
    excess: str,
) -> Weighting:
    """The one rule that the arguments name, Uniform if none.

    Raises:
        ValueError: they name several; temperature <= 0, unknown excess.
        TypeError: `weighting` is no rule.
    """
    checks.check_one_weighting(
        head_weights=head_weights, weighting=weighting, ref_logits=ref_logits, ref_ce=ref_ce
    )
    if ref_ce is not None or ref_logits is not None:
        return Excess(ref_ce, temperature, excess, ref_logits)
    checks.check_temperature(temperature)
    check_choice("excess", excess, checks.EXCESSES)
    if head_weights is not None:
        return Given(head_weights)
    if weighting is None:
        return Uniform()
    if not isinstance(weighting, Weighting):
        raise TypeError(
            f"weighting must be a rule of wmtp.weightings, got {type(weighting).__name__}: pass "
            "weights [B, S, H] as head_weights"
        )
    fields = vars(type(weighting)).get("__dataclass_fields__")
    if fields is None or fields.keys() != vars(weighting).keys():
        raise TypeError(
            f"{type(weighting).__name__} must be a dataclass, so that its fields are known, got a "
            "plain class or one with slots: decorate it with "
            "@dataclasses.dataclass(frozen=True, eq=False)"
        )
    return weighting


class Call(NamedTuple):
    """A loss's arguments, as checked: what goes with the scores."""

    targets: Targets
    rule: Weighting
    terms: Terms
    checked: bool = False  # the weights: the caller's own were, and of a product is nothing to say
    numerics: Numerics = PLAIN
    vocab_size: int | None = None
    metrics: bool = False

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights do, over the pairs of each token: a mask or a prior ends it."""
        return self.rule.sums_to_one and self.terms.factor is None

    @property
    def measured(self) -> bool:
        """Whether the rows' metrics are wanted, of the caller or of the rule."""
        return self.metrics or bool(self.rule.needs)

    @property
    def selects(self) -> bool:
        """Whether the rule leaves rows out."""
        return any(part.selects for part in self.rule.parts())

    def resolved(self) -> "Call":
        """With the rule that the operators take; what multiplies known weights is in them."""
        rule, terms = self.rule.resolved(self.targets), self.terms
        own = rule is self.rule
        if terms.factor is None or not rule.known:
            return self._replace(rule=rule, checked=not own or terms.factor is not None)
        weights = field_of(rule, "head_weights")
        if weights is None:
            return self.formed(Given(terms.factor))
        if own and is_readable(weights):
            negative = may_be_negative(terms.reduction, terms.normalizer is not None)
            checks.raise_on_bad_weight(weights, self.targets.valid, negative)
        return self.formed(Given(product(terms.factor, weights.to(terms.factor.dtype))))

    def formed(self, weights: Given) -> "Call":
        """With the weights that the rule has come to, all else in them."""
        return self._replace(rule=weights, terms=self.terms._replace(factor=None), checked=True)


def local_call(
    name: str, scores: Any, rule: Weighting, **others: Any
) -> tuple[Any, Weighting, dict[str, Any]]:
    """The same, of DTensors this process's part; see `sharded.local_parts`."""
    fields = fields_of(rule)
    values = local_parts(name, scores, **others, **fields)
    if values[0] is scores:
        return scores, rule, others
    found = dict(zip(others, values[1:], strict=False))
    rule = with_field_values(rule, values[1 + len(others) :])
    return values[0], rule, found


def checked_call(
    name: str,
    scores: Tensor,
    target_ids: Tensor | Sequence[Tensor],
    rule: Weighting,
    dtype: torch.dtype,
    *,
    reduction: str | None,
    normalizer: Tensor | float | None,
    horizon: int | None,
    head_prior: Tensor | None,
    numerics: Numerics = PLAIN,
    vocab_size: int | None = None,
    metrics: bool = False,
    columns: int | None = None,
    **of_targets: Any,
) -> Call:
    """What goes with logits [B, S, H, V] or hidden states [B, S, H, D], `name`, checked before:
    all that can be known without reading a tensor's values.

    Args:
        dtype: that the loss is accumulated in.
        numerics: as checked.
        columns: V, where they are hidden states.
        of_targets: see `label_checks.targets_of`.
    """
    heads = scores.shape[2]
    targets = label_checks.targets_of(name, scores, heads, target_ids, **of_targets)
    checks.check_horizon(horizon, heads)
    rule.check(name, scores, targets)
    if reduction is not None:
        check_choice("reduction", reduction, checks.REDUCTIONS)
    named, reduction = reduction, chosen_reduction(reduction, rule)
    checks.check_normalizer(normalizer, reduction, heads)
    checks.check_head_prior(head_prior, heads)
    check_flag("metrics", metrics)
    check_columns(name, scores, vocab_size, columns)
    others = {"normalizer": normalizer, "head_prior": head_prior, **fields_of(rule)}
    check_same_device(name, scores, **others)
    targets = rule.narrowed(targets)
    whole, head_prior = rule, with_decay(rule, head_prior, targets)
    rule, factor = without_factors(rule, targets, dtype)
    terms = terms_of(reduction, as_tensor(normalizer), head_prior, targets, dtype)
    if factor is not None:
        check_factor(whole, targets, terms)
        terms = terms.multiplied(factor)
    _warn_of_turned_axes(name, targets)
    if terms.reduction == "token_mean" and not torch.compiler.is_compiling():
        _warn_of_what_cancels(named, whole, targets)
    how = (numerics, vocab_size, metrics)
    return Call(targets, rule, terms, False, *how)


def chosen_reduction(reduction: str | None, rule: Weighting) -> str:
    """The one that is named, or the rule's own."""
    if reduction is None and not rule.reduction:
        own = (f"{type(part).__name__} {part.reduction}" for part in rule.parts())
        raise ValueError(f"the rules' reductions differ, {', '.join(own)}: name one as reduction")
    return reduction or rule.reduction


def with_decay(rule: Weighting, head_prior: Tensor | None, targets: Targets) -> Tensor | None:
    """[H]: head_prior, or what Decay stands for."""
    decays = [part for part in rule.parts() if isinstance(part, Decay)]
    if decays and head_prior is not None:
        raise ValueError("Decay is a head_prior itself, got another: pass one of them")
    priors = [decay.prior(targets.heads, targets.ids.device) for decay in decays]
    return functools.reduce(Tensor.mul, priors) if priors else head_prior


def without_factors(
    rule: Weighting, targets: Targets, dtype: torch.dtype
) -> tuple[Weighting, Tensor | None]:
    """(what is left of a product for an operator, [B, S, H] that multiplies its weights): without
    the rules whose weights labels tell, and Decay."""
    parts = [part for part in rule.parts() if not isinstance(part, Decay)]
    if len(parts) == len(rule.parts()) == 1:
        return rule, None
    following = [part for part in parts if not part.known]
    known = [part for part in parts if part.known and not isinstance(part, Uniform)]
    if not following and len(known) < 2:
        return (known[0] if known else Uniform()), None
    factor = None
    if known:
        valid = targets.valid()
        found = [part.resolved(targets).weights(valid.to(dtype), valid) for part in known]
        factor = functools.reduce(product, found)
    if not following:
        assert factor is not None
        return Given(factor), None
    return (following[0] if len(following) == 1 else Product(tuple(following))), factor


def check_factor(rule: Weighting, targets: Targets, terms: Terms) -> None:
    """The given weights of a product."""
    for part in rule.parts():
        if not isinstance(part, Given):
            continue
        if part.head_weights.requires_grad:
            raise ValueError(
                "head_weights beside a rule that follows from the cross entropies get no gradient: "
                "detach them"
            )
        if is_readable(part.head_weights):
            negative = may_be_negative(terms.reduction, terms.normalizer is not None)
            checks.raise_on_bad_weight(part.head_weights, targets.valid, negative)


def check_columns(
    name: str, scores: Tensor, vocab_size: int | None, columns: int | None = None
) -> None:
    """Of logits [..., V], or of the `columns` that are made of hidden states."""
    if columns is None:
        check_vocab_size(vocab_size, scores.shape[-1], name)
    else:
        check_vocab_size(vocab_size, columns, "rows of lm_head_weight")


def _warn_of_turned_axes(name: str, targets: Targets) -> None:
    """Of labels that fit [B, S, H, ...], and [B, H, S, ...] better."""
    if torch.compiler.is_compiling() or targets.own:
        return
    if targets.ids.shape[1] == targets.heads > targets.length:
        warn_once(
            f"{name} have fewer positions than heads, and a target for each head: if they are "
            f"[B, H, S, ...], pass {name}.transpose(1, 2)",
            stacklevel=5,
        )


def _warn_of_what_cancels(named: str | None, rule: Weighting, targets: Targets) -> None:
    """Of what is the same for all heads of a token, whoever chose token_mean; of masks that differ
    between heads and cancel in part, where it was named."""
    how, alone = "token_mean divides by the weights of each token, so that", targets.heads == 1
    if alone and rule.scope == "row" and not isinstance(rule, Uniform | Decay):
        weights = field_of(rule, "head_weights")
        if weights is None or not _keeps_or_drops(weights):
            name = type(rule).__name__
            warn_once(f"{how} with one head {name} cancels: name another reduction", stacklevel=5)
    moving, still = targets.target_mask, targets.position_mask
    masks = [moving] if named or alone else []
    masks += [still] if named or alone or (still is not None and still.dim() == 2) else []
    if not all(mask is None or _keeps_or_drops(mask) for mask in masks):
        what = "what a float mask says of a position cancels, but for 0"
        warn_once(f"{how} {what}: name another reduction", stacklevel=5)


def _keeps_or_drops(values: Tensor) -> bool:
    """Whether they are 0 or 1, which cancels nothing; of floats on a device that is not asked."""
    if not values.is_floating_point():
        return True
    return is_readable(values) and bool(((values == 0) | (values == 1)).all())


def in_one_pass(call: Call, dtype: torch.dtype) -> bool:
    """Whether a gradient can be written before all weights are there: what divides the loss, and
    in float16 how large a gradient may become, does not depend on them."""
    rule, terms = call.rule, call.terms
    if rule.known or call.selects:
        return rule.known
    if dtype == torch.float16 and not (rule.at_most_one and terms.factor is None):
        return False
    divided_by_weights = not may_be_negative(terms.reduction, terms.normalizer is not None)
    return call.sums_to_one or not divided_by_weights


def selects_within(call: Call) -> bool:
    """Whether the linear operator selects between the cross entropies and the gradients: it knows
    how many pairs are kept, and these weigh 1."""
    rule, terms = call.rule, call.terms
    alone = isinstance(rule, KeepTop) and rule.group is None and terms.factor is None
    return alone and terms.reduction != "token_mean"


def loss_inputs(call: Call, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of `records.LossInputs`, for an operator that accumulates in `dtype`."""
    targets, terms = call.targets, call.terms
    given = functools.partial(field_of, call.rule)
    weights, ref_ce, ref_logits = given("head_weights"), given("ref_ce"), given("ref_logits")
    if weights is None:
        weights = terms.factor
    shape = (targets.ids.shape[0], targets.length, targets.heads)
    if ref_ce is not None:
        ref_ce, center = ref_ce.detach().to(dtype), given("center")
        if center is not None:  # a reference of each head's own
            ref_ce = targets.reference_of_heads(ref_ce) + center.detach().to(dtype)
        ref_ce = targets.reference_for_operators(ref_ce)
    return {
        "target_ids": targets.for_operators(),
        "head_weights": None if weights is None else weights.to(dtype).expand(shape).contiguous(),
        "head_scale": terms.head_scale,
        "ref_ce": ref_ce,
        "numbers": _numbers(call.rule),
        "normalizer": terms.normalizer,
        "teacher": None if ref_logits is None else ref_logits.detach(),
    }


def row_settings_of(call: Call, backend: str) -> dict[str, Any]:
    """The fields of `records.RowSettings` that a call tells."""
    return {
        "ignore_index": call.targets.ignore_index,
        "backend": backend,
        "numerics": call.numerics,
        "vocab_size": call.vocab_size,
    }


def _numbers(rule: Weighting) -> Tensor | None:
    if rule.known or not rule.numbers:
        return None
    found = [as_tensor(number) for number in rule.number_values()]
    if len(found) == 1:
        return found[0][None]
    devices = {number.device for number in found}
    device = max(devices, key=lambda device: device.type != "cpu")
    return torch.stack([number.to(device, torch.float64) for number in found])
