"""Where logits and gradient lie against 128-byte boundaries, each on its own, changes no number."""

import itertools
import math

import pytest
import torch

from support.agreement import GRADIENT_TOLERANCE, relative_error
from support.backends import row_settings
from wmtp import kernels
from wmtp.records import RowInputs

if not kernels.interpreted():
    pytest.skip("a device aligns all its storages", allow_module_level=True)

from wmtp.kernels import loss
from wmtp.kernels.launch import Case, OfHeads, Rule, launch
from wmtp.kernels.rows import UNIT_BYTES
from wmtp.reference import max_and_log_sum

BOUNDARY = UNIT_BYTES.value
# Bytes from a storage's begin to the tensor's: no boundary before it is in the storage, or one of
# 16 bytes, or one of 128.
INTO = (0, 16, BOUNDARY)
PLACES = {
    torch.float32: list(itertools.product(range(0, BOUNDARY, 4), INTO)),
    torch.bfloat16: list(zip(range(0, BOUNDARY, 2), itertools.cycle(INTO), strict=False)),
}
# Each phase once: for what finds its place as the loss of one head does.
EACH_PHASE = list(zip(range(0, BOUNDARY, 4), itertools.cycle(INTO), strict=False))


class Placed:
    """A tensor that begins `phase` bytes after a boundary, between bytes that nobody may write."""

    def __init__(self, values, place):
        phase, into = place
        dtype, nbytes = values.dtype, values.nbytes
        self._memory = torch.full((into + nbytes + 2 * BOUNDARY,), 0xFF, dtype=torch.uint8)
        begin = (phase - into - self._memory.data_ptr()) % BOUNDARY
        self._span = slice(begin + into, begin + into + nbytes)
        count = (into + nbytes) // dtype.itemsize
        storage = torch.frombuffer(self._memory.numpy(), dtype=dtype, offset=begin, count=count)
        self.tensor = storage[into // dtype.itemsize :].view(values.shape).copy_(values)
        assert self.tensor.data_ptr() % BOUNDARY == phase
        assert self.tensor.storage_offset() * dtype.itemsize == into

    def assert_nothing_around_it_is_written(self):
        around = torch.cat((self._memory[: self._span.start], self._memory[self._span.stop :]))
        assert (around == 0xFF).all()


def make_row(dtype, heads=1):
    """Rows [1, 1, H, V] of three units and a bit, their targets, and softmax - onehot."""
    vocabulary = 3 * BOUNDARY // dtype.itemsize + 1
    logits = (3 * torch.randn(1, 1, heads, vocabulary)).to(dtype)
    target_ids = torch.tensor([[0, vocabulary - 1, 5][: 1 + heads]])
    onehots = torch.nn.functional.one_hot(target_ids[0, 1:], vocabulary)
    return logits, target_ids, logits.double().softmax(-1) - onehots


def launch_on(logits, target_ids, grad, head_offsets=None):
    """The loss's kernel, all weights 1."""
    heads = logits.shape[2]
    ones = torch.ones(max(4, heads))
    outputs = (torch.empty(heads) for _ in range(6))
    offsets = target_ids if head_offsets is None else torch.tensor(head_offsets)
    of_heads = OfHeads(ones, ones, ones, ones, ones, offsets, *outputs)
    how = (row_settings(), Rule(), head_offsets)
    launch(Case(logits, target_ids[:, 1:], heads, grad, of_heads, *how))


def assert_right(grad, wanted):
    assert relative_error(grad, wanted) <= GRADIENT_TOLERANCE[grad.dtype]


@pytest.fixture
def tiers(monkeypatch):
    """`next` forces another one."""
    turns = itertools.cycle(("row", "online", "token"))
    return (monkeypatch.setenv("WMTP_TRITON_TIER", tier) for tier in turns)


def placed(places, same_phase):
    """(place of the logits, of their gradient): every one of the first, with the same phase but
    otherwise into its storage, or with another phase."""
    for i, (phase, into) in enumerate(places):
        other_into = INTO[(INTO.index(into) + 1 + i % 2) % 3]
        other = (phase, other_into) if same_phase else places[(5 * i + 3) % len(places)]
        yield (phase, into), other


@pytest.mark.parametrize("same_phase", [True, False])
@pytest.mark.parametrize("dtype", PLACES, ids=str)
def test_a_gradient_anywhere(tiers, dtype, same_phase):
    logits, target_ids, wanted = make_row(dtype)
    for place, grad_place in placed(PLACES[dtype], same_phase):
        next(tiers)
        ours, grad = Placed(logits, place), Placed(torch.full_like(logits, math.nan), grad_place)
        launch_on(ours.tensor, target_ids, grad.tensor)
        assert_right(grad.tensor, wanted)
        assert torch.equal(ours.tensor, logits)
        ours.assert_nothing_around_it_is_written()
        grad.assert_nothing_around_it_is_written()


@pytest.mark.parametrize("dtype", PLACES, ids=str)
def test_in_place_anywhere(tiers, dtype):
    logits, target_ids, wanted = make_row(dtype)
    for place in PLACES[dtype]:
        next(tiers)
        ours = Placed(logits, place)
        launch_on(ours.tensor, target_ids, ours.tensor)
        assert_right(ours.tensor, wanted)
        ours.assert_nothing_around_it_is_written()


@pytest.mark.parametrize("in_place", [True, False])
def test_heads_each_anywhere(tiers, in_place):
    """Heads of memory of their own; the gradient at a third place, or over them."""
    dtype = torch.float32
    logits, target_ids, wanted = make_row(dtype, heads=2)
    anywhere = itertools.cycle(EACH_PHASE[9:])
    for places in placed(EACH_PHASE, False):
        next(tiers)
        heads = [Placed(logits[:, :, k], place) for k, place in enumerate(places)]
        rows, offsets = loss.as_rows([head.tensor for head in heads])
        grad = Placed(torch.full_like(logits, math.nan), next(anywhere))
        if in_place:
            launch_on(rows, target_ids, rows, offsets)
            found = torch.stack([head.tensor for head in heads], 2)
        else:
            launch_on(rows, target_ids, grad.tensor, offsets)
            found = grad.tensor
        assert_right(found, wanted)
        for each in (*heads, grad):
            each.assert_nothing_around_it_is_written()


@pytest.mark.parametrize("same_phase", [True, False])
def test_the_gradient_of_cross_entropies_anywhere(monkeypatch, same_phase):
    logits, target_ids, wanted = make_row(torch.float32)
    logits, wanted = (torch.cat((t, torch.zeros_like(t)), 1) for t in (logits, wanted))
    of_rows = (*max_and_log_sum(logits), torch.ones(1, 2, 1))
    for place, grad_place in placed(EACH_PHASE, same_phase):
        ours, grad = Placed(logits, place), Placed(torch.full_like(logits, math.nan), grad_place)
        monkeypatch.setattr(torch, "empty_like", lambda *_, grad=grad, **__: grad.tensor)
        assert_right(
            kernels.row_gradient(
                RowInputs(ours.tensor, target_ids[:, 1:], *of_rows), row_settings()
            ),
            wanted,
        )
        grad.assert_nothing_around_it_is_written()
