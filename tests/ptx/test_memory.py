"""What the machine says of accesses that must not be."""

import numpy as np
import pytest
import torch

from ptx.bench import execute
from ptx.memory import Global

LANE = "mov.u32 %r1, %tid.x; mul.wide.u32 %rd5, %r1, {size}; add.s64 %rd6, %rd1, %rd5;"


def kinds(code, *tensors, **options):
    return execute(code, tensors=tensors, **options).record.kinds()


def test_a_vector_of_each_lane_is_loaded_and_stored():
    source, target = torch.arange(128.0), torch.zeros(128)
    code = """
    mov.u32 %r1, %tid.x; mul.wide.u32 %rd5, %r1, 16;
    add.s64 %rd6, %rd1, %rd5; add.s64 %rd7, %rd2, %rd5;
    ld.global.L1::evict_first.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd6 + 0 ];
    st.global.v4.b32 [ %rd7 + 0 ], { %r5, %r4, %r3, %r2 };
    """
    assert not kinds(code, source, target)
    assert torch.equal(target.view(-1, 4), source.view(-1, 4).flip(1))


@pytest.mark.parametrize(("elements", "found"), [(32, set()), (31, {"outside of memory"})])
def test_bounds(elements, found):
    code = LANE.format(size=4) + "ld.global.b32 { %r2 }, [ %rd6 + 0 ];"
    assert kinds(code, torch.zeros(elements)) == found
    assert kinds(code.replace("+ 0", "+ -4"), torch.zeros(32)) == {"outside of memory"}


def test_what_lies_outside_is_not_stored_and_the_rest_is():
    target = torch.zeros(20)
    code = LANE.format(size=4) + "st.global.b32 [ %rd6 + 0 ], { 0f3F800000 };"
    assert kinds(code, target) == {"outside of memory"}
    assert (target == 1).all()


def test_one_tensor_is_not_reached_from_another():
    beside = torch.zeros(64)
    first, second = beside[:32].clone(), beside[32:].clone()
    distance = second.data_ptr() - first.data_ptr()
    code = LANE.format(size=4) + f"add.s64 %rd6, %rd6, {distance}; ld.global.b32 %r2, [%rd6];"
    assert kinds(code, first, second) == {"outside of memory"}
    together = Global([first.untyped_storage(), second.untyped_storage()])
    assert together.address(second) - together.address(first) == distance


@pytest.mark.parametrize(("offset", "found"), [(0, set()), (8, {"misaligned"})])
def test_natural_alignment(offset, found):
    storage = torch.zeros(256)
    into = -storage.data_ptr() // 4 % 4 + offset // 4
    code = LANE.format(size=16) + "ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd6 + 0 ];"
    assert kinds(code, storage[into:]) == found


@pytest.mark.parametrize(("value", "found"), [("%r2", {"lanes write different bits to one place"}),
                                              ("%r3", set())])  # fmt: skip
def test_lanes_that_write_to_one_place(value, found):
    code = f"mov.u32 %r2, %tid.x; mov.u32 %r3, 7; st.global.b32 [%rd1], {value};"
    assert kinds(code, torch.zeros(1)) == found


def test_shared_memory_holds_nothing_before_it_is_written():
    early = "mov.b32 %r1, global_smem; ld.shared.b32 %r2, [%r1+4];"
    assert kinds(early, shared=8) == {"reads shared memory before it is written"}
    assert not kinds("st.shared.b32 [global_smem+4], 5;" + early, shared=8)
    assert kinds("st.shared.b32 [global_smem+8], 5;", shared=8) == {"outside of shared memory"}


def test_narrow_accesses_extend_and_cut():
    machine = execute(
        "st.shared.v2.b8 [global_smem], {%rs1, %rs2}; ld.shared.b16 %rs3, [global_smem];",
        {"rs1": 0x1234, "rs2": 0x56},
        shared=4,
    )
    assert int(machine.registers["%rs3"][0]) == 0x5634
    target = torch.zeros(4, dtype=torch.bool)
    execute("st.global.b8 [%rd1+2], 1;", tensors=(target,))
    assert target.tolist() == [False, False, True, False]


def test_masked_lanes_touch_nothing():
    code = (
        LANE.format(size=4)
        + """
    setp.lt.u32 %p1, %r1, 20;
    mov.u32 %r2, 0x0;
    @%p1 ld.global.b32 { %r2 }, [ %rd6 + 0 ];
    @!%p1 mov.u32 %r2, 9;
    """
    )
    machine = execute(code, tensors=(torch.ones(20, dtype=torch.int32),))
    assert not machine.record.found
    assert np.array_equal(machine.registers["%r2"], np.where(np.arange(32) < 20, 1, 9))
