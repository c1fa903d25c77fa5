"""How the linear loss cuts its tokens into chunks, and what that takes."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from support.linear_cases import SOME, gradients, make_case
from wmtp import fused_linear_weighted_mtp_loss, linear_next_token_cross_entropy
from wmtp.benchmarks.memory import peak_bytes
from wmtp.labels import has_target, shift_to_heads
from wmtp.ops.plan import make_plan
from wmtp.ops.product import MIB, Linear, default_chunk_bytes
from wmtp.records import LinearInputs, LinearSettings

IDS = torch.tensor([[10, 11, 12, -1, 14], [20, -1, -1, 23, 24]])


def linear_of(tokens, heads=2, vocabulary=30, dim=4):
    """A product of float32 whose chunks hold so many tokens of IDS."""
    hidden, weight = torch.randn(*IDS.shape, heads, dim), torch.randn(vocabulary, dim)
    row_bytes = 4 * vocabulary + 12 * dim
    settings = LinearSettings(
        rule="",
        reduction="sum",
        ignore_index=-1,
        backend="cpu",
        dtype=torch.float32,
        accum_dtype=torch.float32,
        chunk_bytes=tokens * heads * row_bytes,
        wanted=[True] * 3,
    )
    inputs = LinearInputs(hidden=hidden, weight=weight, target_ids=IDS[:, 1:])
    linear = Linear.of(inputs, settings)
    assert linear.row_bytes == row_bytes
    return linear


def plan_of(target_ids, linear):
    return make_plan(target_ids, linear.asked(), torch.device("cpu"))


def test_rows_and_their_targets():
    plan = plan_of(IDS[:, 1:], linear_of(10))
    # token: 0      1   2        3  |  5  6        7        8
    # head:  0,1    0   1        0  |  -  1        0,1      0
    assert plan.rows.tolist() == [0, 1, 2, 5, 6, 13, 14, 15, 16]
    assert plan.targets.tolist() == [11, 12, 12, 14, 14, 23, 23, 24, 24]
    assert len(plan.chunks) == 1


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 99])
def test_chunks_are_whole_tokens_and_nearly_equal(tokens):
    linear = linear_of(tokens)
    plan = plan_of(IDS[:, 1:], linear)
    live = has_target(IDS, 2, -1).any(-1).flatten()
    assert linear.chunk_tokens == tokens
    counts = [int(live[chunk.tokens].sum()) for chunk in plan.chunks]
    assert sum(counts) == live.sum() == 7
    assert len(counts) == -(-7 // tokens)
    assert max(counts) <= tokens
    assert max(counts) - min(counts) <= 1
    for chunk in plan.chunks:
        of_chunk = plan.rows[chunk.rows] // 2
        assert of_chunk.min() >= chunk.tokens.start
        assert of_chunk.max() < chunk.tokens.stop
    assert [chunk.rows.start for chunk in plan.chunks[1:]] == [
        chunk.rows.stop for chunk in plan.chunks[:-1]
    ]
    assert plan.chunks[0].rows.start == 0
    assert plan.chunks[-1].rows.stop == len(plan.rows)


def test_targets_are_those_of_the_shift():
    ids = torch.arange(24).view(2, 12)
    linear = linear_of(3, heads=4)
    linear = linear._replace(hidden=torch.randn(2, 12, 4, 4))
    plan = plan_of(ids[:, 1:], linear)
    shifted = shift_to_heads(ids, 4, -100).flatten()
    assert torch.equal(plan.targets, shifted[plan.rows])
    assert (shifted != -100).sum() == len(plan.rows)


def test_nothing_to_do():
    plan = plan_of(torch.full((2, 5), -1), linear_of(3))
    assert plan.chunks == []
    assert len(plan.rows) == 0


def test_the_default_is_2048_rows_and_at_most_1_gib():
    assert default_chunk_bytes(1000) == 2_048_000
    assert default_chunk_bytes(10 * MIB) == 1024 * MIB


def test_one_chunk_where_that_takes_no_more_than_the_sum_of_several():
    """2048 rows of bfloat16 by default; the sum in float32 would take V D 2 bytes more."""
    dim, vocabulary, heads = 64, 128, 2
    row_bytes = 2 * vocabulary + 8 * dim
    most = 2048 + vocabulary * dim * 2 // row_bytes  # rows
    for rows, chunks in ((most, 1), (most + heads, 2)):
        hidden = torch.empty(1, rows // heads, heads, dim, dtype=torch.bfloat16)
        weight = torch.empty(1, vocabulary, dim, dtype=torch.bfloat16)
        linear = linear_of(1)._replace(
            **{"hidden": hidden, "weight": weight, "dtype": torch.bfloat16, "chunk_bytes": None},
            positions=rows // heads,
        )
        assert -(-linear.tokens // linear.chunk_tokens) == chunks
        assert linear.sum_dtype == (torch.bfloat16 if chunks == 1 else torch.float32)
        for other in ({"weight_wanted": False}, {"accum_dtype": torch.bfloat16}):
            assert linear._replace(**other).chunk_tokens == 2048 // heads


def test_never_less_than_a_token():
    assert linear_of(1)._replace(chunk_bytes=1).chunk_tokens == 1


def accumulator(weight):
    return weight.numel() * (4 if weight.dtype.itemsize == 2 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighting", ["given", "ref_ce"])
@pytest.mark.parametrize("chunk_bytes", [2 * MIB, 6 * MIB])
def test_peak_memory(weighting, dtype, chunk_bytes):
    """Flat in S and in V: a chunk, a few MiB, and what was asked for."""
    for length, vocabulary in ((128, 4000), (1024, 4000), (128, 16000)):
        leaves, options = make_case(dtype, weighting, shape=(1, length, 4, 32, vocabulary))
        kept = sum(leaf.nbytes for leaf in leaves[:2]) + accumulator(leaves[1])
        how = {"chunk_bytes": chunk_bytes}
        peak = peak_bytes(
            lambda: gradients(fused_linear_weighted_mtp_loss, leaves, options, **how)  # noqa: B023
        )
        assert chunk_bytes / 4 <= peak - kept <= chunk_bytes + 3 * MIB


def test_peak_memory_under_checkpointing():
    """What is saved for backward is packed then: no gradient is held beside it."""
    leaves, options = make_case(shape=(1, 64, 4, 64, 16000))
    how = {"chunk_bytes": MIB, "use_reentrant": False}

    def step():
        result = checkpoint(fused_linear_weighted_mtp_loss, *leaves[:2], **options, **how)
        return torch.autograd.grad(result.loss, leaves[:2])

    assert peak_bytes(step) <= leaves[0].nbytes + leaves[1].nbytes + 4 * MIB


def test_peak_memory_of_the_reference():
    (hidden, weight, _), options = make_case(shape=(1, 2048, 1, 32, 8000))
    peak = peak_bytes(
        lambda: linear_next_token_cross_entropy(
            hidden[:, :, 0], weight, options["target_ids"], chunk_bytes=2 * MIB
        )
    )
    assert peak <= 3 * MIB < hidden.shape[1] * weight.shape[0] * 4


@pytest.mark.parametrize("chunk_bytes", [1, SOME, None])
def test_chunks_change_nothing_but_rounding(chunk_bytes):
    leaves, options = make_case(torch.float64, "ref_ce", bias=True)
    found = gradients(fused_linear_weighted_mtp_loss, leaves, options, chunk_bytes=chunk_bytes)
    wanted = gradients(fused_linear_weighted_mtp_loss, leaves, options, chunk_bytes=2 * SOME)
    torch.testing.assert_close(found, wanted)
