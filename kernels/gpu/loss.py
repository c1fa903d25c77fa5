"""The loss over a whole batch: the token kernel, and the sum of what it finds.

The gradient is left to `row_gradient`, in backward.
"""

import torch

from wmtp.kernels.token_kernel import token_loss
from wmtp.reduction import counted_tokens, find_denominator


def weighted_loss(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    head_weights: torch.Tensor | None,
    ref_ce: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    temperature: float,
    signed: bool,
    reduction: str,
    ignore_index: int,
    gradient: str,
) -> tuple[torch.Tensor, ...]:
    """Launch. Arguments are taken as checked; `gradient` is "none".

    Returns:
        loss [], valid_mask [B, S] bool, ce [B, S, H], token_loss [B, S], weight_sum [B, S],
        row_scalar [B, S, H] = dloss / dce, lse [B, S, H], factors [2] = (1 / denominator, 1),
        grad [0].
    """
    token_losses, row_scalar, weight_sum, ce, lse = token_loss(
        logits,
        target_ids,
        head_weights,
        ref_ce,
        temperature,
        signed,
        reduction == "token_mean",
        ignore_index,
    )
    inverse = 1 / find_denominator(weight_sum, reduction, normalizer)
    return (
        token_losses.sum() * inverse,
        counted_tokens(weight_sum),
        ce,
        token_losses,
        weight_sum,
        row_scalar * inverse,
        lse,
        torch.stack((inverse, torch.ones_like(inverse))),
        logits.new_empty(0),
    )
