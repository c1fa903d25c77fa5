"""inplace=True: who is told that logits hold their gradient, and who may go on."""

import pytest
import torch

from support.in_place import MODIFIED, OVERWRITTEN, cpu_loss, new_logits
from wmtp import fused_weighted_mtp_loss, mtp_cross_entropy, next_token_cross_entropy
from wmtp.inplace import _notes
from wmtp.reference import compute_weighted_mtp_loss


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_other_users_of_the_logits_are_told(before):
    """From the forward on, for there the logits are overwritten."""
    logits, ids = new_logits(1, 6, 2, 40), torch.randint(40, (1, 6))
    z_loss = logits.square().sum()
    loss = cpu_loss(logits, ids, inplace=True).loss
    if not before:
        loss.backward()
    with pytest.raises(RuntimeError, match=MODIFIED):
        z_loss.backward()


@pytest.mark.parametrize("backward_first", [False, True])
def test_a_second_use_of_the_logits_is_refused(backward_first):
    logits, ids = new_logits(1, 6, 2, 40), torch.randint(40, (1, 6))
    loss = cpu_loss(logits, ids, inplace=True).loss
    if backward_first:
        loss.backward()
    second_uses = (
        lambda: cpu_loss(logits, ids),
        lambda: cpu_loss(logits, ids, inplace=True),
        lambda: cpu_loss(logits[:, 1:4], ids[:, 1:4]),
        lambda: cpu_loss(logits[..., 3:], ids - 3),
        lambda: cpu_loss(torch.randn(1, 6, 2, 40), ids, ref_logits=logits[:, :, 0]),
        lambda: fused_weighted_mtp_loss(logits, ids, backend="eager"),
        lambda: compute_weighted_mtp_loss(logits, ids, horizon=2),
        lambda: mtp_cross_entropy(logits, ids),
        lambda: next_token_cross_entropy(logits[:, :, 1], ids),
    )
    for use in second_uses:
        with pytest.raises(ValueError, match=OVERWRITTEN):
            use()


def test_a_detached_alias_is_refused_too():
    logits, ids = new_logits(1, 6, 2, 40), torch.randint(40, (1, 6))
    alias = logits.detach()
    cpu_loss(logits, ids, inplace=True)
    for use in (alias, logits.detach()):
        with pytest.raises(ValueError, match=OVERWRITTEN):
            cpu_loss(use, ids)


def test_each_of_two_chunks_is_remembered():
    logits, ids = new_logits(2, 6, 2, 40), torch.randint(40, (2, 6))
    for chunk in (0, 1):
        cpu_loss(logits[chunk : chunk + 1], ids[chunk : chunk + 1], inplace=True)
    for chunk in (0, 1):
        with pytest.raises(ValueError, match=OVERWRITTEN):
            cpu_loss(logits[chunk : chunk + 1], ids[chunk : chunk + 1])


def slices(cut):
    """[3, 4, 2, 30] logits, not a leaf's, and its parts, with their targets, as `cut` says."""
    z, ids = new_logits(3, 4, 2, 30), torch.randint(30, (3, 4))
    return z, cut(z, ids)


DISJOINT = {
    "heads": lambda z, ids: [(z[:, :, k : k + 1], ids) for k in range(2)],
    "batch": lambda z, ids: [(z[b : b + 1], ids[b : b + 1]) for b in range(3)],
    "sequence": lambda z, ids: [(z[:, :2], ids[:, :2]), (z[:, 2:], ids[:, 2:])],
    "every other": lambda z, ids: [(z[:, i::2], ids[:, i::2]) for i in range(2)],
    "sequence first": lambda z, ids: [
        (z.view(4, 3, 2, 30).transpose(0, 1)[b : b + 1], ids[b : b + 1]) for b in range(3)
    ],
    "columns": lambda z, ids: [(z[..., v : v + 15], ids % 15) for v in (0, 15)],
    "a list": lambda z, ids: [([z[:, :, k] for k in range(2)], ids)],
    "two lists": lambda z, ids: [
        ([z[b : b + 1, :, k] for k in range(2)], ids[b : b + 1]) for b in range(3)
    ],
}


@pytest.mark.parametrize("cut", DISJOINT.values(), ids=DISJOINT)
def test_slices_that_share_nothing_may_be_summed(target, cut):
    backend, device = target
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        with torch.device(device):
            z, parts = slices(cut)
        losses = [
            fused_weighted_mtp_loss(logits, ids, inplace=inplace, backend=backend).loss
            for logits, ids in parts
        ]
        total = sum((k + 1) * loss for k, loss in enumerate(losses))
        gradients.append(torch.autograd.grad(total, z)[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    for logits, ids in parts:
        with pytest.raises(ValueError, match=OVERWRITTEN):
            fused_weighted_mtp_loss(logits, ids, backend=backend)


FILLS = {
    "copy_": lambda z, new: z.detach().copy_(new),
    ".data.copy_": lambda z, new: z.data.copy_(new),
    "numpy": lambda z, new: z.detach().numpy().__setitem__(slice(None), new.numpy()),
    "out=": lambda z, new: torch.mul(new, 1, out=z.data),
}


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("backward", [True, False])
def test_a_buffer_may_be_filled_again(fill, backward):
    """Whoever fills it, and only what was filled."""
    buffer, ids = torch.empty(4, 6, 2, 40), torch.randint(40, (4, 6))
    for step in range(3):
        new = torch.randn_like(buffer)
        fill(buffer, new)
        logits = buffer.detach().requires_grad_()
        (expected,) = torch.autograd.grad(cpu_loss(new.requires_grad_(), ids).loss, new)
        loss = cpu_loss(logits, ids, inplace=True).loss
        if backward or step == 2:
            torch.testing.assert_close(torch.autograd.grad(loss * 3, logits)[0], 3 * expected)
    fill(buffer[:2], new[:2].detach())
    cpu_loss(buffer[:2], ids[:2])
    for still in (buffer, buffer[2:], buffer[1:3], buffer[2:, :, 1:]):
        with pytest.raises(ValueError, match=OVERWRITTEN):
            cpu_loss(still, ids[: len(still)])


def test_a_gradient_of_zeros_is_known_by_the_version():
    logits, ids = new_logits(1, 6, 2, 40), torch.full((1, 6), -100)
    cpu_loss(logits, ids, inplace=True)
    with pytest.raises(ValueError, match=OVERWRITTEN):
        cpu_loss(logits, ids)
    logits.detach().zero_()
    cpu_loss(logits, ids, inplace=True)


def test_notes_do_not_pile_up():
    buffer, ids = torch.empty(1, 64, 2, 40), torch.randint(40, (1, 64))
    for length in torch.randint(1, 64, (60,)).tolist():
        buffer.data[:, :length].normal_()
        cpu_loss(buffer[:, :length].detach().requires_grad_(), ids[:, :length], inplace=True)
    assert len(_notes(buffer)) < 12


def test_a_gradient_that_was_written_over_is_missed():
    logits, ids = new_logits(1, 6, 2, 40), torch.randint(40, (1, 6))
    loss = cpu_loss(logits, ids, inplace=True).loss
    with torch.no_grad():
        logits[:, :1] = 0
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()


def test_a_gradient_that_was_filled_over_in_part_is_missed():
    buffer, ids = new_logits(4, 6, 2, 40), torch.randint(40, (4, 6))
    whole = cpu_loss(buffer, ids, inplace=True).loss
    buffer.data[:1].normal_()
    part = cpu_loss(buffer[:1], ids[:1], inplace=True).loss
    with pytest.raises(RuntimeError, match=MODIFIED):
        whole.backward()
    part.backward()


def test_logits_that_were_written_again_are_logits_again():
    logits, ids = new_logits(1, 6, 2, 40), torch.randint(40, (1, 6))
    values = logits.detach().clone()
    expected = cpu_loss(values, ids).loss
    cpu_loss(logits, ids, inplace=True)
    with torch.no_grad():
        logits.copy_(values)
        assert cpu_loss(logits, ids).loss == expected


@pytest.mark.gpu
def test_logits_that_are_filled_again_are_known_without_waiting_for_the_device():
    logits = torch.randn(2, 6, 2, 40, device="cuda").requires_grad_()
    ids = torch.randint(40, (2, 6), device="cuda")
    fused_weighted_mtp_loss(logits, ids, inplace=True)
    with torch.no_grad():
        logits.normal_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_weighted_mtp_loss(logits, ids, inplace=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match=OVERWRITTEN):
        fused_weighted_mtp_loss(logits, ids)
