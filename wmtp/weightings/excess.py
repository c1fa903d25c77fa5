"""More for heads that are far from a reference model's cross entropy (algorithm rho1-wmtp).

    excess[b, t, k] = |ce[b, t, k] - ref_ce[b, t + k]|       (excess="signed": without the bars)
    w[b, t, :]      = softmax over the valid k of excess[b, t, :] / temperature

The excess loss is that of Rho-1 (Lin et al. 2024, arXiv 2404.07965, eq. 3), which uses the signed
form; here it weighs heads within a token instead of selecting tokens. B batch, S sequence, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from wmtp import checks
from wmtp.kinds import check_choice, check_same_device, check_scores
from wmtp.labels import has_target, shift_to_heads
from wmtp.weightings.base import Weighting, as_tensor, softmax_over_heads

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True, eq=False)
class Excess(Weighting):
    """w[b, t, :] = softmax over valid k of |ce[b, t, k] - ref_ce[b, t + k]| / temperature.

    Attributes:
        ref_ce: [B, S - 1] float, nats: position t of the reference about `target_ids[t + 1]`, as
            `wmtp.next_token_cross_entropy` returns it.
        temperature: > 0, nats, a number or a 0-d tensor.
        excess: "abs", or "signed" for ce - ref_ce.
        ref_logits: [B, S, V'] float, the reference's next-token logits, instead of `ref_ce`; read
            once. For losses on logits.

    Raises, with the loss:
        ValueError: both references or none, of other shapes; temperature <= 0; unknown excess.
        TypeError: a reference that is not floating point.

        >>> import torch
        >>> excess = Excess(ref_ce=torch.zeros(1, 2), temperature=1.0)
        >>> excess.weights(torch.tensor([[[2.0, 5.0]]]), torch.ones(1, 1, 2) > 0, torch.zeros(2))
        tensor([[[0.0474, 0.9526]]])
    """

    ref_ce: Tensor | None = None
    temperature: Tensor | float = 0.7
    excess: str = "abs"
    ref_logits: Tensor | None = None

    scope = "token"
    sums_to_one = at_most_one = compares = True
    numbers = ("temperature",)

    def weights(self, ce: Tensor, valid: Tensor, ref_ce: Tensor) -> Tensor:  # type: ignore[override]
        """Also: ref_ce [B, S, H], that of the token which each head predicts."""
        score = difference(ce, ref_ce, self.excess)
        return softmax_over_heads(score, valid, as_tensor(self.temperature))

    @property
    def device(self) -> Callable[..., Any]:
        return _signed_excess if self.excess == "signed" else _absolute_excess

    @property
    def case(self) -> str:
        return f"{self.excess}_excess"

    def check(self, name: str, scores: Tensor) -> None:
        given = {"ref_ce": self.ref_ce, "ref_logits": self.ref_logits}
        checks.check_one_weighting(**given)
        if self.ref_logits is not None:
            checks.check_ref_logits(self.ref_logits, name, scores)
        elif self.ref_ce is not None:
            checks.check_ref_ce(self.ref_ce, *scores.shape[:2])
        else:
            raise ValueError("Excess has nothing to compare with: pass ref_ce or ref_logits")
        checks.check_temperature(self.temperature)
        check_choice("excess", self.excess, checks.EXCESSES)


def difference(ce: Tensor, ref_ce: Tensor, excess: str) -> Tensor:
    """ce - ref_ce ("signed") or its absolute value ("abs"), of any shape."""
    signed = ce - ref_ce
    return signed if excess == "signed" else signed.abs()


# Triton reads their source, and would read annotations as its own.
def _absolute_excess(ce, valid, ref_ce, numbers_ptr):  # type: ignore[no-untyped-def]
    return _softmax(tl.abs(ce - ref_ce) / tl.load(numbers_ptr), valid)  # type: ignore[no-untyped-call]


def _signed_excess(ce, valid, ref_ce, numbers_ptr):  # type: ignore[no-untyped-def]
    return _softmax((ce - ref_ce) / tl.load(numbers_ptr), valid)  # type: ignore[no-untyped-call]


def _softmax(score, valid):  # type: ignore[no-untyped-def]
    score = tl.where(valid, score, float("-inf"))
    w = tl.where(valid, tl.exp(score - tl.max(score, axis=0)), 0.0)
    return w / tl.where(tl.max(valid.to(tl.int32), axis=0) > 0, tl.sum(w, axis=0), 1.0)


def align_ref_ce(ref_ce: Tensor, length: int, horizon: int) -> Tensor:
    """[B, S, H] of ref_ce [B, S - 1]: the reference's about the token that head k at t predicts."""
    # ref_ce[t] is about token t + 1: shifted one to the right it sits at the token it is about.
    ce_of_token = F.pad(ref_ce, (1, 0))[:, :length]
    return shift_to_heads(ce_of_token, horizon, 0.0)


def excess_head_weights(
    ce_per_head: Tensor,
    ref_ce: Tensor,
    target_ids: Tensor,
    temperature: Tensor | float = 0.7,
    excess: str = "abs",
    ignore_index: int = -100,
) -> Tensor:
    """Weights of the rho1-wmtp algorithm: more for heads that are far from a reference model.

        excess[b, t, k] = |ce[b, t, k] - ref_ce[b, t + k]|      (excess="signed": without the bars)
        w[b, t, :] = softmax over the valid k of excess[b, t, :] / temperature

    The excess loss is that of Rho-1 (Lin et al. 2024, arXiv 2404.07965, eq. 3), which uses the
    signed form; here it weighs heads within a token instead of selecting tokens.

    Args:
        ce_per_head: [B, S, H] float, nats.
        ref_ce: [B, S - 1] float, nats: position t of the reference predicting `target_ids[t + 1]`.
        target_ids: [B, S] integer, unshifted.
        temperature: > 0, in nats.
        excess: "abs" or "signed".
        ignore_index: a target of this id gets no weight.

    Returns:
        [B, S, H] of ce_per_head's dtype, without gradient; 0 where there is no target.

    Raises:
        ValueError: wrong shapes, mixed devices, temperature <= 0, unknown excess.
        TypeError: ce or ref_ce not floating point, target_ids not integer.

        >>> import torch
        >>> ce, ref_ce = torch.tensor([[[2.0, 5.0], [3.0, 0.0], [0.0, 0.0]]]), torch.zeros(1, 2)
        >>> w = excess_head_weights(ce, ref_ce, torch.tensor([[0, 1, 2]]), temperature=1.0)
        >>> w[0]                                       # softmax(2, 5); then one head; then none
        tensor([[0.0474, 0.9526],
                [1.0000, 0.0000],
                [0.0000, 0.0000]])
    """
    score = excess_loss(ce_per_head, ref_ce, excess)
    checks.check_targets_of("ce_per_head", ce_per_head, target_ids, ignore_index)
    checks.check_temperature(temperature)
    check_same_device("ce_per_head", ce_per_head, temperature=temperature)
    valid = has_target(target_ids, score.shape[2], int(ignore_index))
    return softmax_over_heads(score, valid, as_tensor(temperature))


def excess_loss(ce_per_head: Tensor, ref_ce: Tensor, excess: str) -> Tensor:
    """[B, S, H], detached: ce[b, t, k] - ref_ce[b, t + k], or its absolute value."""
    batch, length, heads = check_scores("ce_per_head", ce_per_head, "[B, S, H]")
    checks.check_ref_ce(ref_ce, batch, length)
    check_same_device("ce_per_head", ce_per_head, ref_ce=ref_ce)
    check_choice("excess", excess, checks.EXCESSES)
    aligned = align_ref_ce(ref_ce.detach().to(ce_per_head.dtype), length, heads)
    return difference(ce_per_head.detach(), aligned, excess)
