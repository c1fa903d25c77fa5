"""What every kernel here shares: where a row's aligned part lies, and its arithmetic.

A row is V logits of one (token, head), begun at any element of memory. Seen in units of 128 bytes,

        |..xxxxx|xxxxxxxx|xxxxxxxx|xxx.....|       x the row, | a multiple of 128 bytes
         left edge   the inner part   right edge

the inner part starts at a multiple that the compiler can prove, so it moves in 16-byte accesses for
every V (50257 included); the two edges are at most two units and are read under one mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# What every kernel is decorated with: it is compiled once, and not again, in the middle of
# training, for an integer that happens to be 1 or a multiple of 16, or for a small tensor of the
# caller's that begins anywhere. Of logits and gradients the alignment is wanted: `aligned_base`.
ONE_BINARY = {
    "do_not_specialize": [
        *("lead", "stride_b", "stride_s", "stride_h", "tokens", "seq_len", "vocab_size"),
        *("target_stride_b", "target_stride", "targets", "ref_stride_b", "ref_stride"),
        *("heads", "blocks", "has_normalizer", "heads_share", "largest_gradient"),
        *("slope", "offset", "amplitude", "center", "z_loss", "label_smoothing"),
        *("grad_lead", "grad_stride_b", "grad_stride_s", "grad_stride_h", "ignore_index"),
    ],
    "do_not_specialize_on_alignment": [
        *("target_ptr", "weight_ptr", "head_scale_ptr", "normalizer_ptr", "ref_ce_ptr"),
        *("numbers_ptr",),
        *("row_max_ptr", "log_sum_ptr", "c_ptr", "factor_ptr"),
    ],
}
OPTIONS = {"enable_fp_fusion": True}  # of every launch; from Triton 3.10 on not the default
UNIT_BYTES = tl.constexpr(128)  # a cache line
VECTOR_BYTES = tl.constexpr(16)  # the widest access of one thread
LOG2_E = tl.constexpr(1.4426950408889634)


def launch_shape(vocab_size: int, itemsize: int, warp_size: int = 32) -> tuple[int, int]:
    """(BLOCK, num_warps) of a program that streams rows: V -> elements a step, warps.

        row bytes   threads   step      why
        >= 8 KiB    256       8 KiB     two 16-byte loads in flight a thread. An H100 needs 25 GB/s
                                        x 600 ns = 15 KiB in flight an SM: two programs, of the four
                                        that 64 registers a thread allow
        less        fewer     the row   a short row must not leave most lanes masked

    The lower end is what the edges need: two units of lanes, one for each running maximum.
    """
    row_bytes = triton.next_power_of_2(vocab_size) * itemsize
    lanes_bytes = 2 * (UNIT_BYTES.value // itemsize) * VECTOR_BYTES.value
    step_bytes = min(max(row_bytes, lanes_bytes), 8192)
    threads = max(step_bytes // (2 * VECTOR_BYTES.value), 2 * warp_size)
    return step_bytes // itemsize, threads // warp_size


def warp_size(device: torch.device) -> int:
    """Threads a warp: 64 on AMD's data-centre cards, 32 elsewhere and in the interpreter."""
    if device.type != "cuda":
        return 32
    return torch.cuda.get_device_properties(device).warp_size


def aligned_base(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A view that begins on a 128-byte boundary, and how many elements before `tensor` that is.

    Triton proves 16-byte accesses from a pointer that is a multiple of 16: where the storage itself
    begins later than the boundary, one of those will do. Where it begins later than both the tensor
    is returned as it is: right, only slower.
    """
    offset = tensor.storage_offset()
    for boundary in (UNIT_BYTES.value, VECTOR_BYTES.value):
        lead = tensor.data_ptr() % boundary // tensor.element_size()
        if lead == 0:
            return tensor, 0
        if lead <= offset:
            return tensor.as_strided((1,), (1,), offset - lead), lead
    return tensor, 0


def targets(target_ids: torch.Tensor) -> dict[str, Any]:
    """The kernels' arguments of `records.LossInputs.target_ids`."""
    return {
        "target_ptr": target_ids,
        "target_stride_b": target_ids.stride(0),
        "target_stride": target_ids.stride(1),
        "targets": target_ids.shape[1:].numel(),
    }


def strides(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """The kernels' arguments of this name, for B, S and H."""
    return {f"{name}_{axis}": tensor.stride(i) for i, axis in enumerate("bsh")}


def in_phase(
    logits: torch.Tensor,
    grad: torch.Tensor,
    leads: tuple[int, int],
    head_offsets: tuple[int, ...] | None = None,
) -> bool:
    """Whether each row and its gradient lie alike against 128-byte boundaries, as counted from the
    two bases: `leads` are `aligned_base`'s, and addresses say something else where it found none.

    Contiguous logits do. Where they do not (a slice of a padded vocabulary), 16-byte stores are
    kept and the loads are narrow.
    """
    distances = [leads[1] - leads[0]]
    strides = list(zip(logits.shape, grad.stride(), logits.stride(), strict=True))
    for size, ours, theirs in strides[: 3 if head_offsets is None else 2]:
        if size > 1:
            distances.append(ours - theirs)
    for k, offset in enumerate(head_offsets or ()):
        distances.append(k * grad.stride(2) - offset)
    unit = UNIT_BYTES.value // logits.element_size()
    return all(distance % unit == 0 for distance in distances)


@triton.jit
def inner_part(begin, vocab_size, UNIT: tl.constexpr):
    """(peel, inner): the aligned part is columns [peel, peel + inner), inner a multiple of UNIT.

    A row that holds no full unit has inner 0, and its left edge then covers all up to `peel`.
    """
    peel = (first_unit(begin, UNIT) - begin).to(tl.int32)
    return peel, tl.maximum(vocab_size - peel, 0) // UNIT * UNIT


@triton.jit
def first_unit(begin, UNIT: tl.constexpr):
    """`begin` rounded up to a multiple of UNIT, which the compiler sees."""
    return (begin + UNIT - 1) // UNIT * UNIT


@triton.jit
def edge_columns(lane, peel, inner, UNIT: tl.constexpr):
    """Columns of both edges on lanes [0, 2 UNIT); outside [0, V) where an edge is shorter."""
    return lane + peel - UNIT + tl.where(lane < UNIT, 0, inner)


@triton.jit
def exp(x):
    """e^x; 0 where that is below 1.2e-38, for tl.exp spends more instructions on these than on the
    rest."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def finite_or_zero(maximum):
    """What to subtract before exp: inf - inf must not turn a row of -inf, or a +inf, into NaN."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def rounded_product(a, b):
    """a b, to be summed up; 0 where a is 0, even beside inf or NaN.

    It is rounded here. Fused into the first addition of a reduction it would not be, in one lane
    of each pair, so that lanes would hold sums of different last bits.
    """
    return tl.where(a == 0, 0.0, tl.fma(a, b, 0.0))


@triton.jit
def cross_entropy(m, s, x_target, in_range):
    """(ce, log s) in nats from a row's maximum and sum and its target's logit; NaN out of range.

    (m - x_target) + log s: the log-sum-exp m + log s itself would lose the digits of log s to a
    large m, so it is never formed.
    """
    log_s = tl.where(in_range, tl.log(s), float("nan"))
    return (m - x_target) + log_s, log_s
