"""The arguments of a loss: which weighting they name, and whether they fit together."""

from typing import Any

import torch
from torch import Tensor

from wmtp import checks
from wmtp.kinds import check_choice, check_same_device
from wmtp.sharded import local_parts
from wmtp.weightings import Excess, Given, Uniform, Weighting
from wmtp.weightings.base import as_tensor


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


def local_call(
    name: str, scores: Any, target_ids: Any, normalizer: Any, rule: Weighting
) -> tuple[Any, Any, Any, Weighting]:
    """The same, of DTensors this process's part; see `sharded.local_parts`."""
    fields = vars(rule)
    values = local_parts(name, scores, target_ids=target_ids, normalizer=normalizer, **fields)
    if values[0] is not scores:
        rule = rule.with_fields(**dict(zip(fields, values[3:], strict=True)))
    return *values[:3], rule


def check_call(
    name: str,
    scores: Tensor,
    target_ids: Tensor,
    rule: Weighting,
    *,
    reduction: str,
    normalizer: Tensor | float | None,
    ignore_index: int,
    horizon: int | None,
) -> None:
    """What goes with logits [B, S, H, V] or hidden states [B, S, H, D], `name`, checked before:
    all that can be known without reading a tensor's values."""
    checks.check_target_ids(target_ids, name, scores)
    checks.check_horizon(horizon, scores.shape[2])
    rule.check(name, scores)
    check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_normalizer(normalizer)
    checks.check_ignore_index(ignore_index)
    check_same_device(name, scores, target_ids=target_ids, normalizer=normalizer, **vars(rule))


def in_one_pass(
    rule: Weighting, reduction: str, normalizer: Tensor | float | None, dtype: torch.dtype
) -> bool:
    """Whether a gradient can be written before all weights are there: what divides the loss, and
    in float16 how large a gradient may become, does not depend on them."""
    if rule.known:
        return True
    if dtype == torch.float16 and not rule.at_most_one:
        return False
    divided_by_weights = reduction == "token_mean" or normalizer is None
    return rule.sums_to_one or reduction == "sum" or not divided_by_weights


def loss_inputs(
    rule: Weighting, target_ids: Tensor, normalizer: Tensor | float | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The fields of `records.LossInputs`, for an operator that accumulates in `dtype`."""
    given = vars(rule).get
    weights, ref_ce, ref_logits = given("head_weights"), given("ref_ce"), given("ref_logits")
    return {
        "target_ids": target_ids.long().contiguous(),
        "head_weights": None if weights is None else weights.to(dtype).contiguous(),
        "ref_ce": None if ref_ce is None else ref_ce.detach().to(dtype).contiguous(),
        "numbers": _numbers(rule),
        "normalizer": as_tensor(normalizer),
        "teacher": None if ref_logits is None else ref_logits.detach(),
    }


def _numbers(rule: Weighting) -> Tensor | None:
    if rule.known or not rule.numbers:
        return None
    found = [as_tensor(getattr(rule, name)) for name in rule.numbers]
    if len(found) == 1:
        return found[0][None]
    devices = {number.device for number in found}
    device = max(devices, key=lambda device: device.type != "cpu")
    return torch.stack([number.to(device, torch.float64) for number in found])
