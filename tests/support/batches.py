"""Batches as trainers have them, drawn at random, and what a reader of the definition makes of
them: plain loops, which know nothing of `wmtp.labels`."""

import math
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from wmtp.weightings import Critic, Excess, Given, Uniform, Weighting

IGNORED = -100
FORMS = ("plain", "longer", "shifted", "shifted longer", "own", "list")
WEIGHTINGS = ("uniform", "given", "of heads", "excess", "signed", "critic")
REDUCTIONS = (None, "token_mean", "weight_mean", "pair_mean", "head_mean", "sum")
MASKS = (None, "bool", "int", "float")


@dataclass
class Batch:
    """What a loss is called with beside its scores.

    Attributes:
        target_ids: as `form` says.
        options: of the targets.
        rule: the weighting.
        how: the reduction and what goes with it.
    """

    shape: tuple[int, int, int]
    form: str
    target_ids: Any
    options: dict[str, Any]
    rule: Weighting
    how: dict[str, Any]


def features(case: Batch) -> tuple[str, ...]:
    """What was chosen, option by option."""

    def of(value: Any) -> str:
        return f"{value.dtype} {value.dim()}" if isinstance(value, Tensor) else type(value).__name__

    rule = case.rule
    weighting = type(rule).__name__
    if isinstance(rule, Given):
        weighting = f"given {rule.head_weights.dim()}"
    elif isinstance(rule, Excess):
        weighting = rule.excess + " of logits" * (rule.ref_logits is not None)
    options = ("offsets", "document_ids", "target_mask", "position_mask")
    return (
        case.form,
        weighting,
        str(case.how["reduction"]),
        *(of(case.options.get(name)) for name in options),
        *(of(case.how.get(name)) for name in ("head_prior", "normalizer")),
    )


def draw(seed: int, vocabulary: int = 17) -> Batch:
    """One of all combinations."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    shape = (random.randint(1, 3), random.randint(1, 7), random.randint(1, 4))
    batch, length, heads = shape
    form = random.choice(FORMS)
    own = form in ("own", "list")
    tokens = length + ("longer" in form) * random.randint(1, 4)

    def integers(most: int, *size: int) -> Tensor:
        return torch.randint(most, size, generator=generator)

    def mask(kind: str, *size: int) -> Tensor:
        kept = integers(4, *size) > 0
        if kind == "bool":
            return kept
        if kind == "int":
            return kept.int() * 3
        return kept * (torch.rand(size, generator=generator) + 0.2)

    sizes = (batch, length, heads) if own else (batch, tokens)
    ids = integers(vocabulary, *sizes)
    ids[torch.rand(sizes, generator=generator) < 0.15] = IGNORED
    options: dict[str, Any] = {}
    if form.startswith("shifted"):
        options["shifted"] = True
    if not own:
        if random.random() < 0.3:
            options["offsets"] = [random.randint(1, 5) for _ in range(heads)]
        if random.random() < 0.4:
            more = form.startswith("shifted") and random.random() < 0.5
            options["document_ids"] = integers(3, batch, tokens + more).sort(1).values
        if kind := random.choice(MASKS):
            options["target_mask"] = mask(kind, batch, tokens)
    if kind := random.choice(MASKS):
        axes = (batch, length, heads) if random.random() < 0.5 else (batch, length)
        options["position_mask"] = mask(kind, *axes)
    if form == "list":
        ids = list(ids.unbind(2))
    reference = {"own": (batch, length, heads), "list": (batch, length, heads)}.get(
        form, (batch, tokens if "shifted" in options else tokens - 1)
    )
    name = random.choice(WEIGHTINGS)
    rule: Weighting = Uniform()
    if name in ("given", "of heads"):
        rule = Given(torch.rand(shape if name == "given" else (heads,), generator=generator))
    elif name == "critic":
        rule = Critic(torch.randn(batch, length, generator=generator))
    elif name != "uniform":
        sign = "signed" if name == "signed" else "abs"
        next_tokens = not own and tokens <= length + ("shifted" not in options)
        if next_tokens and random.random() < 0.5:
            logits = 3 * torch.randn(batch, length, vocabulary, generator=generator)
            rule = Excess(None, 0.7, sign, ref_logits=logits)
        else:
            rule = Excess(5 * torch.rand(reference, generator=generator), 0.7, sign)
    how: dict[str, Any] = {"reduction": random.choice(REDUCTIONS)}
    if random.random() < 0.3:
        how["head_prior"] = torch.rand(heads, generator=generator)
    if random.random() < 0.3:
        how["normalizer"] = 1.0 + random.random()
        if how["reduction"] == "head_mean" and random.random() < 0.5:
            how["normalizer"] = torch.randint(3, (heads,), generator=generator)
    return Batch(shape, form, ids, options, rule, how)


def targets_by_hand(case: Batch) -> list[list[list[int | None]]]:
    """By b, t, k the id that the pair is asked for; None: it does not count."""
    batch, length, heads = case.shape
    return [
        [[_target(case, b, t, k) for k in range(heads)] for t in range(length)]
        for b in range(batch)
    ]


def _target(case: Batch, b: int, t: int, k: int) -> int | None:
    options = case.options
    mask = options.get("position_mask")
    if mask is not None and not (mask[b, t] if mask.dim() == 2 else mask[b, t, k]):
        return None
    if isinstance(case.rule, Critic) and t + _offset(case, k) >= case.shape[1]:
        return None
    if case.form == "list":
        found = int(case.target_ids[k][b, t])
    elif case.form == "own":
        found = int(case.target_ids[b, t, k])
    else:
        place = _place(case, t, k)
        if place >= case.target_ids.shape[1]:
            return None
        documents, mask = options.get("document_ids"), options.get("target_mask")
        if documents is not None:
            cut = documents.shape[1] > case.target_ids.shape[1]
            if documents[b, t] != documents[b, t + _offset(case, k) if cut else place]:
                return None
        if mask is not None and not mask[b, place]:
            return None
        found = int(case.target_ids[b, place])
    return None if found == IGNORED else found


def _offset(case: Batch, k: int) -> int:
    return case.options.get("offsets", range(1, case.shape[2] + 1))[k]


def _place(case: Batch, t: int, k: int) -> int:
    return t + _offset(case, k) - case.options.get("shifted", False)


def factor_by_hand(case: Batch, b: int, t: int, k: int) -> float:
    """Of the float masks."""
    found = 1.0
    mask = case.options.get("target_mask")
    if mask is not None and mask.is_floating_point():
        found *= float(mask[b, _place(case, t, k)])
    mask = case.options.get("position_mask")
    if mask is not None and mask.is_floating_point():
        found *= float(mask[b, t] if mask.dim() == 2 else mask[b, t, k])
    return found


def loss_by_hand(case: Batch, logits: Tensor) -> float:
    """The definition, pair by pair, in float64."""
    batch, length, heads = case.shape
    wanted = targets_by_hand(case)
    log_p = logits.double().log_softmax(-1)
    reduction = case.how["reduction"] or "token_mean"
    prior = case.how.get("head_prior")
    sums, weights_of, tokens = [0.0] * heads, 0.0, []
    counts = [0.0] * heads
    for b in range(batch):
        for t in range(length):
            ce = {
                k: -float(log_p[b, t, k, target])
                for k in range(heads)
                if (target := wanted[b][t][k]) is not None
            }
            weights = _weights(case, b, t, ce)
            for k in ce:
                factor = factor_by_hand(case, b, t, k)
                counts[k] += factor
                weights[k] *= factor
                if prior is not None and reduction != "head_mean":
                    weights[k] *= float(prior[k])
                sums[k] += weights[k] * ce[k]
            total = sum(weights.values())
            weights_of += total
            if total > 1e-8:
                tokens.append(sum(weights[k] * ce[k] for k in ce) / total)
    return _reduced(case, reduction, sums, weights_of, tokens, counts)


def _reduced(case, reduction, sums, weight_sum, tokens, counts) -> float:
    heads, prior = case.shape[2], case.how.get("head_prior")
    normalizer = case.how.get("normalizer")
    if reduction == "head_mean":
        divisors = counts if normalizer is None else torch.as_tensor(normalizer).expand(heads)
        each = [1 / heads] * heads if prior is None else prior.tolist()
        return sum(
            each[k] * sums[k] / float(divisors[k]) for k in range(heads) if float(divisors[k])
        )
    over, divisor = {
        "token_mean": (sum(tokens), len(tokens)),
        "weight_mean": (sum(sums), weight_sum),
        "pair_mean": (sum(sums), sum(counts)),
        "sum": (sum(sums), 1.0),
    }[reduction]
    divisor = divisor if normalizer is None else normalizer
    return over / divisor if over else 0.0


def _weights(case: Batch, b: int, t: int, ce: dict[int, float]) -> dict[int, float]:
    rule = case.rule
    if isinstance(rule, Given):
        given = rule.head_weights
        return {k: float(given[k] if given.dim() == 1 else given[b, t, k]) for k in ce}
    if isinstance(rule, Uniform):
        return dict.fromkeys(ce, 1.0)
    if isinstance(rule, Excess):
        score = {k: ce[k] - _reference(case, b, t, k) for k in ce}
        if rule.excess == "abs":
            score = {k: abs(value) for k, value in score.items()}
    else:
        score = {k: _rise(case, b, t + _offset(case, k)) for k in ce}
    largest = max(score.values(), default=0.0)
    shares = {k: math.exp((value - largest) / 0.7) for k, value in score.items()}
    return {k: share / sum(shares.values()) for k, share in shares.items()}


def _reference(case: Batch, b: int, t: int, k: int) -> float:
    ref_ce, ref_logits = case.rule.ref_ce, case.rule.ref_logits
    if ref_ce is not None and ref_ce.dim() == 3:
        return float(ref_ce[b, t, k])
    place = _place(case, t, k)
    position = place - (not case.options.get("shifted", False))
    if ref_logits is not None:
        return -float(ref_logits[b, position].double().log_softmax(-1)[case.target_ids[b, place]])
    return float(ref_ce[b, position])


def _rise(case: Batch, b: int, position: int) -> float:
    values, documents = case.rule.values, case.options.get("document_ids")
    begins = position == 0 or (
        documents is not None and documents[b, position] != documents[b, position - 1]
    )
    before = 0.0 if begins else float(values[b, position - 1])
    return float(values[b, position]) - 0.95 * before
