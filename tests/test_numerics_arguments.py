"""What is no scale, cap, z-loss, smoothing or number of columns: one clear error each."""

import pytest
import torch

from wmtp import (
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    linear_next_token_cross_entropy,
    mtp_cross_entropy,
    next_token_cross_entropy,
)
from wmtp.reference import compute_weighted_mtp_loss

NAN, INF = float("nan"), float("inf")
BAD_VALUE = (ValueError, TypeError)
BAD = [
    ({"softcap": 30.0, "sigmoid_cap": (30.0, 0.0, 7.5)}, ValueError, "exclude each other"),
    *(({"logit_scale": bad}, ValueError, "logit_scale must be") for bad in (0, -1.0, NAN, INF)),
    *(({"softcap": bad}, ValueError, "softcap must be") for bad in (0.0, -30, NAN, INF, "30")),
    ({"sigmoid_cap": 30.0}, ValueError, r"sigmoid_cap must be \(a, b, c\)"),
    ({"sigmoid_cap": (30.0, 0.0)}, ValueError, r"sigmoid_cap must be \(a, b, c\)"),
    ({"sigmoid_cap": (30.0, NAN, 7.5)}, ValueError, r"sigmoid_cap must be \(a, b, c\)"),
    ({"sigmoid_cap": (0.0, 0.0, 7.5)}, ValueError, r"sigmoid_cap must be \(a, b, c\)"),
    ({"sigmoid_cap": (30.0, 0.0, -1.0)}, ValueError, r"sigmoid_cap must be \(a, b, c\)"),
    *(({"z_loss": bad}, ValueError, "z_loss must be") for bad in (-1e-4, NAN, INF, None)),
    *(({"label_smoothing": bad}, ValueError, "label_smoothing must") for bad in (1, -0.1, NAN)),
    *(
        ({"vocab_size": bad}, (ValueError, TypeError), "vocab_size must")
        for bad in (0, -1, 38, 5.5)
    ),
    *(({"metrics": bad}, (ValueError, TypeError), "metrics must be") for bad in (1, None, "yes")),
    ({"logit_scale": torch.tensor(2.0)}, TypeError, "logit_scale must be a number, got a tensor"),
    ({"softcap": torch.tensor(2.0)}, TypeError, "softcap must be a number, got a tensor"),
    ({"vocab_size": 20}, IndexError, r"for 30, outside \[0, 20\)"),
]


@pytest.mark.parametrize(("options", "error", "told"), BAD, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_bad_input(options, error, told, backend):
    """The same of every function that has the option."""
    logits, ids = torch.randn(1, 4, 2, 37), torch.tensor([[1, 2, 30, 3]])
    weight, how = torch.randn(37, 37), {"backend": backend, **options}
    calls = [
        lambda: fused_weighted_mtp_loss(logits, ids, **how),
        lambda: fused_linear_weighted_mtp_loss(logits, weight, ids, **how),
        lambda: compute_weighted_mtp_loss(logits, ids, horizon=2, **options),
    ]
    if "metrics" not in options:
        calls.append(lambda: mtp_cross_entropy(logits, ids, **how))
        if not {"z_loss", "label_smoothing"} & options.keys():
            calls += [
                lambda: next_token_cross_entropy(logits[:, :, 0], ids, **how),
                lambda: linear_next_token_cross_entropy(logits[:, :, 0], weight, ids, **how),
            ]
    for call in calls:
        with pytest.raises(error, match=told):
            call()
