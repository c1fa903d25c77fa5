"""Rows in blocks: each has its own shift, odd ends, and large gradients are streamed."""

import math
from functools import partial

import pytest
import torch

from support.agreement import assert_agrees, cpu_loss, make_case
from support.covering import in_pairs
from support.instruction_sets import HERE
from wmtp import fused_weighted_mtp_loss, mtp_cross_entropy
from wmtp.checks import FLOAT_DTYPES

pytestmark = pytest.mark.usefixtures("instruction_set", "unwritten_is_nan")

fused = partial(fused_weighted_mtp_loss, backend="cpu")
BLOCK, PROBE, SLACK = 4096, 256, 40  # kernels/cpu/row.h


@in_pairs(
    instruction_set=HERE,
    dtype=[torch.float32, torch.bfloat16],
    position=["first", "last"],
)
def test_infinite_first_block_and_late_maximum(dtype, position):
    """-inf for the whole first block (4096), or a maximum that is met last."""
    case = make_case((1, 3, 4, 9001), dtype, ignored=0)
    if position == "first":
        case.logits[..., :4200] = -math.inf
        case.target_ids = 4200 + case.target_ids % (9001 - 4200)
    else:
        case.logits[..., -1] = 30.0
    assert_agrees(fused, case)


def test_confident_token_keeps_precision_at_a_large_offset():
    logits = torch.full((1, 2, 1, 5), 1e4)
    logits[..., 2] += 4.0
    ce = mtp_cross_entropy(logits, torch.tensor([[0, 2]]), backend="cpu")
    assert ce[0, 0, 0].item() == pytest.approx(math.log1p(4 * math.exp(-4.0)), rel=2e-6)


def rising(logits):
    return torch.linspace(-150, 150, logits.shape[-1]).expand(logits.shape)


def falling(logits):
    return rising(logits).flip(-1)


def late_jump(logits, by=60.0):
    """The last column stands above all others, and is the only one of its block where it can be."""
    columns = torch.arange(logits.shape[-1])
    return torch.where(columns == columns[-1], logits.float().amax(-1, keepdim=True) + by, logits)


def saw(logits):
    """Up and down by more than the slack: a shift is never lowered again."""
    columns = torch.arange(logits.shape[-1])
    return logits + 50.0 * (columns // BLOCK % 2) + 25.0 * (columns // BLOCK)


@in_pairs(
    instruction_set=HERE,
    dtype=FLOAT_DTYPES,
    V=[4095, 4096, 4097, 8193, 20001],
    shape=[rising, falling, late_jump, saw],
)
def test_rows_that_climb_out_of_their_shift(dtype, V, shape):
    case = make_case((1, 4, 2, V), dtype, "given", ignored=0)
    case.logits = shape(case.logits).to(dtype).contiguous()
    case.target_ids[0, 1:3] = torch.tensor([V - 1, V - 2])  # the certain one, and its neighbour
    assert_agrees(fused, case)


@in_pairs(
    instruction_set=HERE,
    dtype=FLOAT_DTYPES,
    place=[PROBE - 1, PROBE, BLOCK - 1, BLOCK, 9000],
    climb=[SLACK - 1, SLACK, SLACK + 0.25, 2 * SLACK + 0.5],
)
def test_one_column_above_the_others(dtype, place, climb):
    """Within the slack it is summed with the first shift, beyond it the block is done again."""
    case = make_case((1, 4, 1, 9001), dtype, ignored=0)
    case.logits = (case.logits / 3).clamp(-3, 3).float()
    case.logits[..., 0] = 4
    case.logits[..., place] = 4 + climb
    case.logits = case.logits.to(dtype)
    case.target_ids[0] = torch.tensor([0, place, 0, place - 1])
    assert_agrees(fused, case)


@pytest.mark.parametrize("V", [5, BLOCK + 1, 9001])
def test_numbers_at_the_ends_of_the_range(V):
    """Differences between two float32 logits may overflow float32."""
    logits = torch.full((1, 3, 1, V), 3e38)
    logits[0, 0, 0, : V // 2] = -3e38
    logits[0, 1] = torch.linspace(-3e38, 3e38, V, dtype=torch.float64).float()
    out = cpu_loss(logits, torch.tensor([[0, V - 1, V - 1]]), gradient="new")
    high = V - V // 2
    assert out.ce[0, :2, 0].tolist() == pytest.approx([math.log(high), 0])
    expected = torch.zeros(2, V)
    expected[0, V // 2 :] = 1 / high
    expected[:, -1] = torch.tensor([1 / high - 1, 0])
    torch.testing.assert_close(out.grad[0, :2, 0], expected)


# Past the caches go gradients from 32 MiB on; the halves of the batch are smaller.
@pytest.mark.parametrize(
    ("dtype", "V"), list(zip(FLOAT_DTYPES, [33, 4099, 50257, 4099], strict=True)), ids=str
)
def test_streamed_gradient_is_the_same_bit_by_bit(dtype, V):
    rows = (32 << 20) // (V * dtype.itemsize) + 2
    logits, target_ids = torch.randn(2, rows // 2 + 1, 1, V), torch.randint(V, (2, rows // 2 + 1))
    logits = logits.to(dtype)
    whole = cpu_loss(logits, target_ids, reduction="sum", gradient="new").grad
    assert whole.nbytes >= 32 << 20
    for b in range(2):
        half = cpu_loss(logits[b, None], target_ids[b, None], reduction="sum", gradient="new").grad
        assert half.nbytes < 32 << 20
        assert torch.equal(whole[b], half[0])
