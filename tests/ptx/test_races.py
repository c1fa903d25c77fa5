"""Races, barriers that not all come to, and CTAs that leave too early: seen, and only where they
are."""

import numpy as np
import pytest
import torch

from ptx.bench import execute

READS = "race: reads what another warp writes"
WRITES = "race: writes what another warp touches"
BARRIER = "bar.sync 0;"
CLUSTER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
# Each thread writes its word, and reads that of the same lane of the next warp, or of its own.
ADDRESSES = """
mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2;
add.s32 %r3, %r1, {step}; and.b32 %r3, %r3, 63; shl.b32 %r3, %r3, 2;
"""
WRITE, READ = "st.shared.b32 [%r2], %r1;", "ld.shared.b32 %r4, [%r3];"


def kinds(*code, **options):
    return execute("".join(code), threads=64, **options).record.kinds()


@pytest.mark.parametrize(
    ("step", "code", "found"),
    [
        (32, (WRITE, READ), {READS, "reads shared memory before it is written"}),
        (32, (WRITE, BARRIER, READ), set()),
        (0, (WRITE, READ), set()),
        (1, (WRITE, BARRIER, READ, WRITE), {WRITES}),
        (1, (WRITE, BARRIER, READ, BARRIER, WRITE), set()),
        (1, (WRITE, BARRIER, READ, BARRIER, WRITE, READ), {READS}),
    ],
)
def test_shared_memory(step, code, found):
    seen = kinds(ADDRESSES.format(step=step), *code, shared=256)
    # In step with one another all write before one reads: only the race is there to be seen.
    assert seen == found - {"reads shared memory before it is written"}


def test_a_read_by_many_warps_is_remembered():
    """The last reader has passed no barrier with the writer, whoever read before."""
    code = """
    mov.u32 %r1, %tid.x; setp.eq.b32 %p1, %r1, 0;
    @%p1 st.shared.b32 [global_smem], %r1;
    bar.sync 0;
    ld.shared.b32 %r2, [global_smem];
    {barrier}
    @%p1 st.shared.b32 [global_smem], %r2;
    """
    assert kinds(code.format(barrier=""), shared=4) == {WRITES}
    assert not kinds(code.format(barrier=BARRIER), shared=4)


@pytest.mark.parametrize(
    ("programs", "offset", "found"),
    [(1, 0, set()), (2, 0, {WRITES}), (2, "%ctaid.x", set())],
)
def test_global_memory_between_programs(programs, offset, found):
    code = f"""
    mov.u32 %r1, {offset}; mul.wide.u32 %rd5, %r1, 4; add.s64 %rd6, %rd1, %rd5;
    mov.u32 %r2, %tid.x; setp.eq.b32 %p1, %r2, 0; mov.u32 %r3, %ctaid.x;
    @%p1 st.global.b32 [ %rd6 + 0 ], {{ %r3 }};
    """
    seen = kinds(code, tensors=(torch.zeros(2),), programs=programs)
    assert seen - {"lanes write different bits to one place"} == (set() if found else found)
    assert bool(seen) == bool(found)


def test_what_another_program_writes_later_is_a_race_too():
    code = """
    mov.u32 %r1, %ctaid.x; setp.eq.b32 %p1, %r1, {reader};
    @%p1 ld.global.b32 { %r2 }, [ %rd1 + 0 ];
    bar.sync 0;
    mov.u32 %r3, %tid.x; setp.eq.b32 %p2, %r3, 0; not.pred %p3, %p1; and.pred %p2, %p2, %p3;
    @%p2 st.global.b32 [ %rd1 + 0 ], { 1 };
    """
    for reader in "01":
        assert kinds(code.replace("{reader}", reader), tensors=(torch.zeros(1),), programs=2) == {
            WRITES
        }


@pytest.mark.parametrize(("barrier", "found"), [("", {WRITES}), (BARRIER, set())])
def test_global_memory_between_warps(barrier, found):
    code = f"""
    mov.u32 %r1, %tid.x; xor.b32 %r2, %r1, 32;
    mul.wide.u32 %rd5, %r1, 4; add.s64 %rd5, %rd5, %rd1;
    mul.wide.u32 %rd6, %r2, 4; add.s64 %rd6, %rd6, %rd1;
    ld.global.b32 {{ %r3 }}, [ %rd5 + 0 ];
    {barrier}
    st.global.b32 [ %rd6 + 0 ], {{ %r3 }};
    """
    assert kinds(code, tensors=(torch.arange(64),)) == found


# In each CTA of two: what the other has written.
ACROSS = """
mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; add.s32 %r7, %r1, 5;
mov.b32 %r3, global_smem; mapa.shared::cluster.u32 %r4, %r3, %r2;
st.shared.b32 [%r3], %r7;
{before}
ld.shared::cluster.b32 %r5, [%r4];
{after}
"""


def across(before, after):
    return execute(ACROSS.format(before=before, after=after), ctas=2, threads=32, shared=4)


def test_shared_memory_of_another_cta():
    machine = across(CLUSTER, CLUSTER)
    assert not machine.record.found
    assert np.array_equal(machine.registers["%r5"], np.repeat([6, 5], 32))
    assert across("", CLUSTER).record.kinds() == {READS}
    assert across(BARRIER, CLUSTER).record.kinds() == {READS}


def test_a_cta_that_leaves_while_it_is_read():
    left = {"leaves while its shared memory may still be read"}
    assert across(CLUSTER, "").record.kinds() == left
    assert across(CLUSTER, BARRIER).record.kinds() == left


def test_what_lies_between_arrival_and_wait_is_not_ordered():
    halves = CLUSTER.split(" ")
    write = "st.shared.b32 [%r3], %r7;"
    machine = across(f"{halves[0]} {write} {halves[1]}", CLUSTER)
    assert machine.record.kinds() == {READS}


@pytest.mark.parametrize("lanes", [64, 40, 32])
def test_a_barrier_that_not_all_come_to(lanes):
    code = f"""
    mov.u32 %r1, %tid.x; setp.ge.u32 %p1, %r1, {lanes};
    @%p1 bra $L;
    bar.sync 0;
$L:
    mov.u32 %r2, 1;
    """
    assert kinds(code) == (set() if lanes == 64 else {"a barrier that not all come to"})


def test_lanes_that_part_meet_again():
    """Each lane goes round as often as it is numbered; then all are a warp."""
    code = """
    mov.u32 %r1, %tid.x; mov.u32 %r2, 0; mov.u32 %r3, 0;
$L1:
    setp.ge.u32 %p1, %r2, %r1;
    @%p1 bra $L2;
    add.s32 %r2, %r2, 1;
    add.s32 %r3, %r3, %r2;
    bra.uni $L1;
$L2:
    shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
    """
    machine = execute(code)
    lane = np.arange(32)
    assert not machine.record.found
    assert np.array_equal(machine.registers["%r3"], lane * (lane + 1) // 2)
    assert np.array_equal(machine.registers["%r4"], (lane ^ 1) * ((lane ^ 1) + 1) // 2)
