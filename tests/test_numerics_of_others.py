"""What other libraries make of logits and beside the cross entropy, by their formulas written out
here, and the one call of ours that is the same number and gradient: "theirs -> our call"."""

import pytest
import torch
import torch.nn.functional as F

from support.agreement import relative_error
from wmtp import fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss, mtp_cross_entropy

B, S, H, V, D = 2, 7, 3, 19, 8
IGNORED = -100
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rows():
    """[B, S, V] of one head, and labels that are shifted, of which some are ignored."""
    labels = torch.randint(V, (B, S))
    labels[0, 2] = labels[1, 4] = IGNORED
    return (3 * torch.randn(B, S, V)).requires_grad_(), labels


def assert_same(ours, theirs, *leaves):
    found, wanted = torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
    errors = [relative_error(one, other) for one, other in zip(found, wanted, strict=True)]
    print(f"loss {relative_error(ours, theirs):.0e}, gradient {max(errors):.0e}")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def ours_of(logits, labels, **how):
    return fused_weighted_mtp_loss(
        logits[:, :, None], labels, shifted=True, reduction="pair_mean", **how
    ).loss


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
def test_torch(eps, rows):
    logits, labels = rows
    flat = logits.flatten(0, 1), labels.flatten()
    theirs = F.cross_entropy(*flat, label_smoothing=eps)
    assert_same(ours_of(logits, labels, label_smoothing=eps), theirs, logits)
    theirs = F.cross_entropy(*flat, label_smoothing=eps, reduction="none").view(B, S)
    ours = mtp_cross_entropy(logits[:, :, None], labels, shifted=True, label_smoothing=eps)
    upstream = torch.randn(B, S)
    assert_same((ours[:, :, 0] * upstream).sum(), (theirs * upstream).sum(), logits)


# Liger: softcap before all; (1 - eps) ce + eps lse - eps / V sum x + z lse^2, their mean.


def liger(logits, labels, eps, z, softcap=None):
    losses = []
    for row, label in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label == IGNORED:
            continue
        x = row if softcap is None else softcap * torch.tanh(row / softcap)
        lse = x.logsumexp(0)
        smooth = (-eps / len(x) * x).sum() + eps * lse
        losses.append((1 - eps) * (lse - x[label]) + smooth + z * lse * lse)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize(("eps", "z"), [(0.1, 0.0), (0.0, 1e-3), (0.1, 1e-2), (0.0, 0.0)])
def test_liger(eps, z, softcap, rows):
    logits, labels = rows
    ours = ours_of(logits, labels, softcap=softcap, label_smoothing=eps, z_loss=z)
    assert_same(ours, liger(logits, labels, eps, z, softcap), logits)


# flash-attention: each row's own loss, of logits times logit_scale, 0 where ignored.


@pytest.mark.parametrize(
    ("eps", "scale", "z"), [(0.0, 1.0, 0.0), (0.1, 0.5, 1e-3), (0.0, 2.0, 0.1)]
)
def test_flash_attention(eps, scale, z, rows):
    logits, labels = rows
    x = scale * logits
    lse, picked = x.logsumexp(-1), x.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    losses = lse - eps * x.sum(-1) / V - (1 - eps) * picked + z * lse.square()
    theirs = losses.masked_fill(labels == IGNORED, 0.0)
    how = {"logit_scale": scale, "label_smoothing": eps, "z_loss": z}
    ours = mtp_cross_entropy(logits[:, :, None], labels, shifted=True, **how)[:, :, 0]
    upstream = torch.randn(B, S)
    assert_same((ours * upstream).sum(), (theirs * upstream).sum(), logits)


# Cut cross-entropy: of hidden states and the head's weight, with a softcap; lse besides.


@pytest.mark.parametrize("softcap", [None, 4.0, 30.0])
def test_cut_cross_entropy(softcap, rows):
    _, labels = rows
    hidden, weight = torch.randn(B, S, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    x = hidden @ weight.T
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    theirs = F.cross_entropy(x.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    result = fused_linear_weighted_mtp_loss(
        hidden[:, :, None], weight, labels, shifted=True, softcap=softcap, metrics=True
    )
    lse = x.logsumexp(-1).masked_fill(labels == IGNORED, 0.0)
    torch.testing.assert_close(result.metrics.lse[:, :, 0], lse.detach(), rtol=1e-5, atol=1e-6)
    assert_same(result.loss, theirs, hidden, weight)


# modded-nanogpt: a sigmoid((x + b) / c), the same logits asked for several tokens, weights summed.


@pytest.mark.parametrize("cap", [(30.0, 0.0, 7.5), (23.0, 5.0, 7.5)], ids=str)
def test_nanogpt(cap, rows):
    logits, ids = rows[0], torch.randint(V, (B, S))
    a, b, c = cap
    x, weights = a * torch.sigmoid((logits + b) / c), torch.tensor([1.0, 0.5, 0.25])
    theirs = sum(
        weight * F.cross_entropy(x[:, : S - k].flatten(0, 1), ids[:, k:].flatten(), reduction="sum")
        for k, weight in enumerate(weights)
    )
    ours = fused_weighted_mtp_loss(
        logits[:, :, None].expand(-1, -1, H, -1), ids, weights, shifted=True, reduction="sum",
        sigmoid_cap=cap,
    ).loss  # fmt: skip
    assert_same(ours, theirs, logits)


# OLMo, PaLM: cross entropy and z lse^2, both over the tokens; Megatron's vocabulary is padded.


def test_a_padded_vocabulary_with_z_loss(rows):
    logits, labels = rows
    labels = labels.clamp(max=15)
    real = logits[..., :16]
    counted = labels != IGNORED
    z = real.logsumexp(-1)[counted].square().mean()
    theirs = F.cross_entropy(real.flatten(0, 1), labels.flatten()) + 1e-2 * z
    assert_same(ours_of(logits, labels, z_loss=1e-2, vocab_size=16), theirs, logits)


# transformers: the whole model's own loss, against that of its last hidden states.
HEADS = {
    "Gemma2": ({"final_logit_softcapping": 5.0, "head_dim": 8}, {"softcap": 5.0}),
    "Gemma3Text": ({"final_logit_softcapping": 5.0, "head_dim": 8}, {"softcap": 5.0}),
    "Cohere": ({"logit_scale": 0.25}, {"logit_scale": 0.25}),
    "Granite": ({"logits_scaling": 4.0}, {"logit_scale": 0.25}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    family = name.removesuffix("Text")
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"this transformers has no {family}")
    settings, ours = HEADS[name]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head.normal_(0, 1.0)  # logits that the cap bends
    ids = torch.randint(3, V, (B, S))
    labels = ids.clone()
    labels[1, 3] = IGNORED
    theirs = model(input_ids=ids, labels=labels).loss
    hidden = model.model(input_ids=ids).last_hidden_state
    loss = fused_linear_weighted_mtp_loss(hidden[:, :, None], head, labels, **ours).loss
    unscaled = fused_linear_weighted_mtp_loss(hidden[:, :, None], head, labels).loss
    assert (loss - unscaled).abs() > 1e-3
    assert_same(loss, theirs, *model.parameters())
