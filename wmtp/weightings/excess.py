"""More for heads that are far from a reference model's cross entropy (algorithm rho1-wmtp).

    excess[b, t, k] = |ce[b, t, k] - ref_ce[b, t + k]|       (excess="signed": without the bars)
    w[b, t, :]      = softmax over the valid k of excess[b, t, :] / temperature

The excess loss is that of Rho-1 (Lin et al. 2024, arXiv 2404.07965, eq. 3), which uses the signed
form; here it weighs heads within a token instead of selecting tokens. B batch, S sequence, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wmtp import checks, label_checks
from wmtp.kinds import check_choice, check_float_tensor, check_same_device, check_scores
from wmtp.labels import Targets
from wmtp.weightings.base import Weighting, as_tensor, softmax_over_heads

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True, eq=False)
class Excess(Weighting):
    """w[b, t, :] = softmax over valid k of |ce[b, t, k] - ref_ce[b, t + k]| / temperature.

    Attributes:
        ref_ce: float, nats, indexed by the token that it is about, as
            `wmtp.next_token_cross_entropy` returns it: [B, T - 1], position t about
            `target_ids[t + 1]`; of shifted labels [B, T]; of each head's own [B, S, H].
        temperature: > 0, nats, a number or a 0-d tensor.
        excess: "abs", or "signed" for ce - ref_ce.
        center: [H] float, nats, or None: how far each head is above the reference by nature, as
            later heads are; subtracted from its excess, before the bars.
        ref_logits: [B, S, V'] float, the reference's next-token logits, instead of `ref_ce`; read
            once.

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
    center: Tensor | None = None

    scope = "token"
    sums_to_one = at_most_one = compares = True
    numbers = ("temperature",)

    def weights(self, ce: Tensor, valid: Tensor, ref_ce: Tensor) -> Tensor:  # type: ignore[override]
        """Also: ref_ce [B, S, H], that of the token which each head predicts."""
        score = difference(ce, self.centered(ref_ce), self.excess)
        return softmax_over_heads(score, valid, as_tensor(self.temperature))

    def centered(self, ref_ce: Tensor) -> Tensor:
        """What ce is compared with, of ref_ce [..., H]."""
        if self.center is None:
            return ref_ce
        return ref_ce + self.center.detach().to(ref_ce.dtype)

    @property
    def device(self) -> Callable[..., Any]:
        return _signed_excess if self.excess == "signed" else _absolute_excess

    @property
    def case(self) -> str:
        return f"{self.excess}_excess"

    def check(self, name: str, scores: Tensor, targets: Targets) -> None:
        given = {"ref_ce": self.ref_ce, "ref_logits": self.ref_logits}
        checks.check_one_weighting(**given)
        if self.ref_logits is not None:
            checks.check_ref_logits(self.ref_logits, name, scores, targets)
        elif self.ref_ce is not None:
            checks.check_ref_ce(self.ref_ce, targets)
        else:
            raise ValueError("Excess has nothing to compare with: pass ref_ce or ref_logits")
        checks.check_temperature(self.temperature)
        check_choice("excess", self.excess, checks.EXCESSES)
        if self.center is not None:
            remedy = "each head's mean excess over the reference"
            check_float_tensor("center", self.center, "[H]", tuple(scores.shape[2:3]), remedy)


def difference(ce: Tensor, ref_ce: Tensor, excess: str) -> Tensor:
    """ce - ref_ce ("signed") or its absolute value ("abs"), of any shape."""
    signed = ce - ref_ce
    return signed if excess == "signed" else signed.abs()


# Triton reads their source, and would read annotations as its own.
def _absolute_excess(ce, valid, ref_ce, entropy, numbers_ptr):  # type: ignore[no-untyped-def]
    return _softmax(tl.abs(ce - ref_ce) / tl.load(numbers_ptr), valid)  # type: ignore[no-untyped-call]


def _signed_excess(ce, valid, ref_ce, entropy, numbers_ptr):  # type: ignore[no-untyped-def]
    return _softmax((ce - ref_ce) / tl.load(numbers_ptr), valid)  # type: ignore[no-untyped-call]


def _softmax(score, valid):  # type: ignore[no-untyped-def]
    score = tl.where(valid, score, float("-inf"))
    w = tl.where(valid, tl.exp(score - tl.max(score, axis=0)), 0.0)
    return w / tl.where(tl.max(valid.to(tl.int32), axis=0) > 0, tl.sum(w, axis=0), 1.0)


def align_ref_ce(ref_ce: Tensor, length: int, horizon: int) -> Tensor:
    """[B, S, H] of ref_ce [B, T - 1]: the reference's about the token that head k at t predicts."""
    # ref_ce[t] is about token t + 1: shifted one to the right it sits at the token it is about.
    return Targets(ref_ce, length, horizon).reference_of_heads(ref_ce)


def excess_head_weights(
    ce_per_head: Tensor,
    ref_ce: Tensor,
    target_ids: Tensor | Sequence[Tensor],
    temperature: Tensor | float = 0.7,
    excess: str = "abs",
    ignore_index: int = -100,
    *,
    shifted: bool = False,
    offsets: Sequence[int] | None = None,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    position_mask: Tensor | None = None,
) -> Tensor:
    """Weights of the rho1-wmtp algorithm: more for heads that are far from a reference model.

        excess[b, t, k] = |ce[b, t, k] - ref_ce[b, t + k]|      (excess="signed": without the bars)
        w[b, t, :] = softmax over the valid k of excess[b, t, :] / temperature

    The excess loss is that of Rho-1 (Lin et al. 2024, arXiv 2404.07965, eq. 3), which uses the
    signed form; here it weighs heads within a token instead of selecting tokens.

    Args:
        ce_per_head: [B, S, H] float, nats.
        ref_ce: float, nats, as in `fused_weighted_mtp_loss`; [B, T - 1] where head k at t compares
            with position t + k, the reference about the same token.
        target_ids, ignore_index, shifted, offsets, document_ids, target_mask, position_mask: which
            pairs count, as in `fused_weighted_mtp_loss`. Other values of float masks than 0 do not
            matter here.
        temperature: > 0, in nats.
        excess: "abs" or "signed".

    Returns:
        [B, S, H] of ce_per_head's dtype, without gradient; 0 where a pair does not count.

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
    _, _, heads = check_scores("ce_per_head", ce_per_head, "[B, S, H]")
    targets = label_checks.targets_of(
        "ce_per_head",
        ce_per_head,
        heads,
        target_ids,
        ignore_index=ignore_index,
        shifted=shifted,
        offsets=offsets,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
    )
    checks.check_ref_ce(ref_ce, targets)
    rule = Excess(ref_ce, temperature, excess)
    rule.check("ce_per_head", ce_per_head, targets)
    check_same_device("ce_per_head", ce_per_head, ref_ce=ref_ce, temperature=temperature)
    aligned = targets.reference_of_heads(ref_ce.detach().to(ce_per_head.dtype))
    return rule.weights(ce_per_head.detach(), targets.valid(), aligned)
