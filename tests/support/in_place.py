"""inplace=True: how it is called, and what whoever comes later is told."""

from functools import partial

import torch

from wmtp import fused_weighted_mtp_loss

MODIFIED = "modified by an inplace operation"
TAKEN = "an earlier backward has it: pass inplace=False to go backward twice"
OVERWRITTEN = "overwritten by their gradient"
NOT_TWICE = r"inplace=True .* pass inplace=False"
cpu_loss = partial(fused_weighted_mtp_loss, backend="cpu")


def new_logits(*shape, dtype=torch.float32):
    """Not a leaf, as a model's are not."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True) * 1
