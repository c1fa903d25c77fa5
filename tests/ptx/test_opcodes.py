"""Each instruction of the machine against cases made by hand from NVIDIA's PTX ISA."""

import math
import re

import numpy as np
import pytest

from ptx.bench import execute, f32, result
from ptx.findings import UnknownError

NAN = 0x7FFFFFFF
INF = f32(math.inf)
TINY = 0x00000001  # the smallest subnormal number
LOW = 1 << 31
MINUS = (1 << 32) - 1  # -1
MINUS64 = (1 << 64) - 1

INTEGERS = [
    ("add.s32 %r0, %r1, %r2", {"r1": 0x7FFFFFFF, "r2": 1}, LOW),
    ("add.s64 %rd0, %rd1, %rd2", {"rd1": MINUS64, "rd2": 2}, 1),
    ("add.s64 %rd0, %rd1, -3", {"rd1": 1}, MINUS64 - 1),
    ("sub.s32 %r0, %r1, %r2", {"r1": 1, "r2": 2}, MINUS),
    ("sub.s64 %rd0, %rd1, %rd2", {"rd1": 1, "rd2": 2}, MINUS64),
    ("mul.lo.s32 %r0, %r1, %r2", {"r1": 0x10001, "r2": 0x10001}, 0x20001),
    ("mul.lo.s64 %rd0, %rd1, %rd2", {"rd1": -3, "rd2": 5}, MINUS64 - 14),
    ("mul.hi.u32 %r0, %r1, %r2", {"r1": MINUS, "r2": 2}, 1),
    ("mul.hi.s32 %r0, %r1, %r2", {"r1": -1, "r2": 2}, MINUS),
    ("mul.wide.u32 %rd0, %r1, %r2", {"r1": MINUS, "r2": 2}, 0x1FFFFFFFE),
    ("mul.wide.s32 %rd0, %r1, %r2", {"r1": -1, "r2": 2}, MINUS64 - 1),
    ("mad.lo.s64 %rd0, %rd1, %rd2, %rd3", {"rd1": 3, "rd2": -5, "rd3": 16}, 1),
    ("mad.lo.s32 %r0, %r1, %r2, %r3", {"r1": 3, "r2": 5, "r3": 1}, 16),
    ("mad.wide.s32 %rd0, %r1, 4, %rd3", {"r1": -1, "rd3": 3}, MINUS64),
    ("mad.wide.u32 %rd0, %r1, 4, %rd3", {"r1": MINUS, "rd3": 4}, 1 << 34),
    ("div.s32 %r0, %r1, %r2", {"r1": -7, "r2": 2}, MINUS - 2),
    ("div.s32 %r0, %r1, %r2", {"r1": 7, "r2": -2}, MINUS - 2),
    ("div.u32 %r0, %r1, %r2", {"r1": MINUS, "r2": 2}, 0x7FFFFFFF),
    ("div.s64 %rd0, %rd1, %rd2", {"rd1": -(2**40) - 1, "rd2": 2}, (1 << 64) - 2**39),
    ("rem.s32 %r0, %r1, %r2", {"r1": -7, "r2": 2}, MINUS),
    ("rem.s64 %rd0, %rd1, %rd2", {"rd1": 7, "rd2": -2}, 1),
    ("rem.u32 %r0, %r1, %r2", {"r1": MINUS, "r2": 16}, 15),
    ("min.s32 %r0, %r1, %r2", {"r1": -1, "r2": 1}, MINUS),
    ("min.u32 %r0, %r1, %r2", {"r1": -1, "r2": 1}, 1),
    ("max.s32 %r0, %r1, 0", {"r1": -1}, 0),
    ("max.s64 %rd0, %rd1, %rd2", {"rd1": -1, "rd2": 1}, 1),
    ("neg.s32 %r0, %r1", {"r1": LOW}, LOW),
    ("neg.s64 %rd0, %rd1", {"rd1": 1}, MINUS64),
    ("abs.s32 %r0, %r1", {"r1": -5}, 5),
    ("and.b32 %r0, %r1, 12", {"r1": 10}, 8),
    ("and.b64 %rd0, %rd1, -16", {"rd1": 31}, 16),
    ("and.b16 %rs0, %rs1, 255", {"rs1": 0x1234}, 0x34),
    ("or.b32 %r0, %r1, %r2", {"r1": 8, "r2": 3}, 11),
    ("or.b16 %rs0, %rs1, %rs2", {"rs1": 8, "rs2": 3}, 11),
    ("or.b64 %rd0, %rd1, %rd2", {"rd1": 8, "rd2": 3}, 11),
    ("xor.b32 %r0, %r1, %r2", {"r1": 10, "r2": 3}, 9),
    ("not.b32 %r0, %r1", {"r1": 1}, MINUS - 1),
    ("not.pred %p0, %p1", {"p1": True}, 0),
    ("and.pred %p0, %p1, %p2", {"p1": True, "p2": False}, 0),
    ("or.pred %p0, %p1, %p2", {"p1": True, "p2": False}, 1),
    ("shl.b32 %r0, %r1, 4", {"r1": 0x10000001}, 16),
    ("shl.b32 %r0, %r1, %r2", {"r1": 1, "r2": 32}, 0),
    ("shl.b64 %rd0, %rd1, 40", {"rd1": 1}, 1 << 40),
    ("shl.b16 %rs0, %rs1, 8", {"rs1": 0x0102}, 0x0200),
    ("shr.u32 %r0, %r1, 31", {"r1": LOW}, 1),
    ("shr.u32 %r0, %r1, 33", {"r1": LOW}, 0),
    ("shr.s32 %r0, %r1, 31", {"r1": LOW}, MINUS),
    ("shr.s32 %r0, %r1, 99", {"r1": LOW}, MINUS),
    ("shr.u64 %rd0, %rd1, 58", {"rd1": -1}, 63),
    ("shr.s64 %rd0, %rd1, 63", {"rd1": -1}, MINUS64),
    ("bfe.u32 %r0, %r1, 4, 2", {"r1": 0x34}, 3),
    ("bfe.u32 %r0, %r1, 28, 8", {"r1": 0xF0000000}, 15),
    ("bfe.s32 %r0, %r1, 4, 2", {"r1": 0x34}, MINUS),
    ("bfe.u32 %r0, %r1, 4, 0", {"r1": -1}, 0),
    ("prmt.b32 %r0, %r1, %r2, 0x5410", {"r1": 0x33221100, "r2": 0x77665544}, 0x55441100),
    ("prmt.b32 %r0, %r1, %r2, 0x7632", {"r1": 0x33221100, "r2": 0x77665544}, 0x77663322),
    ("prmt.b32 %r0, %r1, %r2, 0x0008", {"r1": 0x80, "r2": 0}, 0x808080FF),
    ("selp.b32 %r0, %r1, 7, %p1", {"r1": 3, "p1": False}, 7),
    ("selp.b16 %rs0, 0x1, %rs1, %p1", {"rs1": 3, "p1": True}, 1),
    ("selp.b64 %rd0, %rd1, -1, %p1", {"rd1": 3, "p1": False}, MINUS64),
    ("selp.f32 %r0, %r1, 0f3F800000, %p1", {"r1": 3, "p1": False}, f32(1.0)),
    ("setp.lt.s32 %p0, %r1, %r2", {"r1": -1, "r2": 1}, 1),
    ("setp.lt.u32 %p0, %r1, %r2", {"r1": -1, "r2": 1}, 0),
    ("setp.lt.u64 %p0, %rd1, %rd2", {"rd1": 1, "rd2": -1}, 1),
    ("setp.ge.u32 %p0, %r1, 5", {"r1": 5}, 1),
    ("setp.gt.s64 %p0, %rd1, -1", {"rd1": 0}, 1),
    ("setp.le.s64 %p0, %rd1, %rd2", {"rd1": -5, "rd2": -5}, 1),
    ("setp.ge.s64 %p0, %rd1, %rd2", {"rd1": -6, "rd2": -5}, 0),
    ("setp.lt.s64 %p0, %rd1, %rd2", {"rd1": -6, "rd2": -5}, 1),
    ("setp.gt.s32 %p0, %r1, -1", {"r1": -2}, 0),
    ("setp.eq.b32 %p0, %r1, %r2", {"r1": 4, "r2": 4}, 1),
    ("setp.eq.b64 %p0, %rd1, %rd2", {"rd1": 4, "rd2": 5}, 0),
    ("setp.ne.b32 %p0, %r1, 0", {"r1": 1}, 1),
    ("setp.ne.b64 %p0, %rd1, -100", {"rd1": -100}, 0),
]


def of_floats(*rows):
    """Cases of one opcode: operands in %r1, ... and the result, floats or bits."""

    def bits(x):
        return f32(x) if isinstance(x, float) else x

    for opcode, operands, wanted in rows:
        names = ", ".join(f"%r{i + 1}" for i in range(len(operands)))
        target = "%p0" if opcode.startswith("setp") else "%r0"
        given = {f"r{i + 1}": bits(x) for i, x in enumerate(operands)}
        yield f"{opcode} {target}, {names}", given, bits(wanted)


FLOATS = list(
    of_floats(
        ("add.f32", (1.0, 2.0**-24), 1.0),  # half of the last bit: to even
        ("add.f32", (1.0 + 2.0**-23, 2.0**-24), 1.0 + 2.0**-22),
        ("add.f32", (math.inf, -math.inf), NAN),
        ("add.f32", (TINY, TINY), 2),
        ("add.rn.f32", (1.5, 2.5), 4.0),
        ("add.ftz.f32", (TINY, TINY), 0),
        ("sub.f32", (1.0, 3.0), -2.0),
        ("sub.f32", (0xFFC12345, 1.0), NAN),  # whatever its bits were
        ("mul.f32", (2.0**-100, 2.0**-49), TINY),
        ("mul.f32", (0.0, math.inf), NAN),
        ("mul.ftz.f32", (2.0**-100, 2.0**-49), 0),
        ("fma.rn.f32", (1.0 + 2.0**-12, 1.0 - 2.0**-12, -1.0), -(2.0**-24)),
        ("fma.rn.f32", (2.0**100, 2.0**100, -math.inf), -math.inf),
        # 1 + 2^-24 + 2^-70: rounded twice it is 1.
        ("fma.rn.f32", (1.0 + 2.0**-23, 2.0**-24, 1.0), 1.0 + 2.0**-23),
        ("fma.rn.f32", (2.0**-35, 2.0**-35, 1.0 + 2.0**-23), 1.0 + 2.0**-23),
        ("fma.rn.ftz.f32", (2.0**-100, 2.0**-49, 0.0), 0),
        ("neg.f32", (0.0,), LOW),
        ("abs.f32", (-2.0,), 2.0),
        ("max.f32", (math.nan, 1.0), 1.0),
        ("max.f32", (1.0, math.nan), 1.0),
        ("max.f32", (math.nan, math.nan), NAN),
        ("max.f32", (-0.0, 0.0), 0),
        ("max.f32", (-0.0, -0.0), LOW),
        ("min.f32", (math.nan, 1.0), 1.0),
        ("min.f32", (0.0, -0.0), LOW),
        ("min.f32", (2.0, -3.0), -3.0),
        ("max.NaN.f32", (math.nan, 1.0), NAN),
        ("min.NaN.f32", (1.0, math.nan), NAN),
        ("ex2.approx.f32", (3.0,), 8.0),
        ("ex2.approx.f32", (-149.0,), TINY),
        ("ex2.approx.ftz.f32", (-149.0,), 0),
        ("ex2.approx.f32", (-math.inf,), 0.0),
        ("ex2.approx.f32", (math.inf,), math.inf),
        ("ex2.approx.f32", (TINY,), 1.0),
        ("lg2.approx.f32", (8.0,), 3.0),
        ("lg2.approx.f32", (0.0,), -math.inf),
        ("lg2.approx.f32", (-1.0,), NAN),
        ("lg2.approx.f32", (TINY,), -149.0),
        ("rcp.approx.f32", (4.0,), 0.25),
        ("sqrt.rn.f32", (9.0,), 3.0),
        ("rsqrt.approx.f32", (4.0,), 0.5),
        ("tanh.approx.f32", (0.0,), 0.0),
        ("div.full.f32", (1.0, 4.0), 0.25),
        ("div.full.f32", (1.0, 0.0), math.inf),
        ("div.full.f32", (0.0, 0.0), NAN),
        ("div.rn.f32", (-1.0, 2.0), -0.5),
        ("setp.eq.f32", (0.0, -0.0), 1),
        ("setp.eq.f32", (math.nan, math.nan), 0),
        ("setp.ne.f32", (math.nan, 1.0), 0),
        ("setp.neu.f32", (math.nan, 1.0), 1),
        ("setp.equ.f32", (math.nan, 1.0), 1),
        ("setp.lt.f32", (-1.0, 1.0), 1),
        ("setp.gt.f32", (1.0, math.nan), 0),
        ("setp.gtu.f32", (1.0, math.nan), 1),
        ("setp.le.f32", (1.0, 1.0), 1),
        ("setp.ge.f32", (0.5, 1.0), 0),
        ("setp.nan.f32", (1.0, math.nan), 1),
        ("setp.nan.f32", (1.0, 1.0), 0),
        ("setp.num.f32", (1.0, 1.0), 1),
    )
)

CONVERSIONS = [
    ("cvt.s64.s32 %rd0, %r1", {"r1": -1}, MINUS64),
    ("cvt.s64.s32 %rd0, %rd1", {"rd1": 0x1FFFFFFFF}, MINUS64),  # of a wider register its low half
    ("cvt.u64.u32 %rd0, %r1", {"r1": -1}, MINUS),
    ("cvt.u32.u64 %r0, %rd1", {"rd1": (7 << 32) + 5}, 5),
    ("cvt.u32.u16 %r0, %rs1", {"rs1": 0xFFFF}, 0xFFFF),
    ("cvt.s32.s16 %r0, %rs1", {"rs1": 0xFFFF}, MINUS),
    ("cvt.rn.f32.s32 %r0, %r1", {"r1": -3}, f32(-3.0)),
    ("cvt.rn.f32.u32 %r0, %r1", {"r1": (1 << 24) + 1}, f32(2.0**24)),
    ("cvt.rzi.s32.f32 %r0, %r1", {"r1": f32(-2.7)}, MINUS - 1),
    ("cvt.rzi.s32.f32 %r0, %r1", {"r1": f32(1e20)}, 0x7FFFFFFF),
    ("cvt.rzi.u32.f32 %r0, %r1", {"r1": f32(-1.0)}, 0),
    ("cvt.rzi.s32.f32 %r0, %r1", {"r1": NAN}, 0),
    ("cvt.rn.bf16.f32 %rs0, %r1", {"r1": 0x3F808000}, 0x3F80),  # half-way: to even
    ("cvt.rn.bf16.f32 %rs0, %r1", {"r1": 0x3F818000}, 0x3F82),
    ("cvt.rn.bf16.f32 %rs0, %r1", {"r1": 0x3F808001}, 0x3F81),
    ("cvt.rn.bf16.f32 %rs0, %r1", {"r1": 0x7F7FFFFF}, 0x7F80),  # beyond the largest: inf
    ("cvt.rn.bf16.f32 %rs0, %r1", {"r1": 0x7F800001}, 0x7FFF),  # NaN
    ("cvt.rn.f16.f32 %rs0, %r1", {"r1": f32(1.0)}, 0x3C00),
    ("cvt.rn.f16.f32 %rs0, %r1", {"r1": f32(65520.0)}, 0x7C00),
    ("cvt.rn.f16.f32 %rs0, %r1", {"r1": NAN}, 0x7FFF),
    ("cvt.rn.f16.f32 %rs0, %r1", {"r1": f32(2.0**-24)}, 1),
    ("cvt.f32.bf16 %r0, %rs1", {"rs1": 0xBF80}, f32(-1.0)),
    ("cvt.f32.f16 %r0, %rs1", {"rs1": 1}, f32(2.0**-24)),
    ("cvt.rn.bf16x2.f32 %r0, %r1, %r2", {"r1": f32(1.0), "r2": f32(2.0)}, 0x3F804000),
    ("cvt.rn.f16x2.f32 %r0, %r1, %r2", {"r1": f32(1.0), "r2": f32(2.0)}, 0x3C004000),
    ("mov.b32 %r0, 0f3F800000", {}, f32(1.0)),
    ("mov.u32 %r0, 0x10", {}, 16),
    ("mov.b32 %r0, -1", {}, MINUS),
    ("mov.b64 %rd0, -2", {}, MINUS64 - 1),
    ("mov.u16 %rs0, 0x7f", {}, 127),
    ("mov.pred %p0, -1", {}, 1),
    ("mov.b32 %r0, {%rs1, %rs2}", {"rs1": 0x1111, "rs2": 0x2222}, 0x22221111),
    ("mov.b64 %rd0, {%r1, %r2}", {"r1": 1, "r2": 2}, (2 << 32) + 1),
    ("mov.b32 {%rs0, %rs3}, %r1", {"r1": 0x22221111}, 0x1111),
    ("mov.b32 {_, %rs0}, %r1", {"r1": 0x22221111}, 0x2222),
    ("mov.b32 %r0, global_smem", {}, 0),
    ("mov.u32 %r0, %nctaid.x", {}, 1),
]


@pytest.mark.parametrize(("code", "given", "wanted"), INTEGERS + FLOATS + CONVERSIONS)
def test_an_instruction(code, given, wanted):
    target = code.replace("{", "").split("%")[1].split(",")[0]
    target = "rs0" if "{_" in code else target
    assert result(code + ";", target, **given) == wanted


def test_lanes_and_programs_know_where_they_are():
    code = "mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %laneid;"
    machine = execute(code + "mov.u32 %r3, %cluster_ctarank;", threads=64, ctas=2, programs=3)
    lane = np.arange(64 * 2 * 3)
    assert np.array_equal(machine.registers["%r0"], lane % 64)
    assert np.array_equal(machine.registers["%r1"], lane // 64)
    assert np.array_equal(machine.registers["%r2"], lane % 32)
    assert np.array_equal(machine.registers["%r3"], lane // 64 % 2)


@pytest.mark.parametrize(
    ("code", "source"),
    [
        ("shfl.sync.bfly.b32 %r0, %r1, 5, 31, -1;", lambda lane: lane ^ 5),
        ("shfl.sync.idx.b32 %r0, %r1, 7, 31, -1;", lambda lane: lane // 32 * 32 + 7),
        ("shfl.sync.up.b32 %r0, %r1, 1, 0, -1;", lambda lane: lane - (lane % 32 > 0)),
        ("shfl.sync.down.b32 %r0, %r1, 1, 31, -1;", lambda lane: lane + (lane % 32 < 31)),
    ],
)
def test_shuffles(code, source):
    lane = np.arange(64)
    machine = execute(code, {"r1": 100 + lane}, threads=64)
    assert np.array_equal(machine.registers["%r0"], 100 + source(lane))
    assert not machine.record.found


@pytest.mark.parametrize(
    ("kind", "wanted"), [("max.s32", (20, -12)), ("min.s32", (-11, -43)), ("max.u32", (-1, -12))]
)
def test_reductions_of_a_warp(kind, wanted):
    code = f"mov.b32 %r2, -1; redux.sync.{kind} %r0, %r1, %r2;"
    machine = execute(code, {"r1": 20 - np.arange(64)}, threads=64)
    assert np.array_equal(machine.registers["%r0"].view(np.int32), np.repeat(wanted, 32))


def test_a_warp_that_is_not_whole_is_reported():
    code = """
    mov.u32 %r1, %tid.x;
    setp.lt.u32 %p1, %r1, 40;
    @%p1 bra $L;
    shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;
$L:
    bar.warp.sync -1;
    """
    machine = execute(code, threads=64)
    assert machine.record.kinds() == {"a warp that is not whole"}
    assert sum(machine.record.found.values()) == 24


def test_matrices_of_a_warp():
    """Lane t has word t % 4 of row t // 4; lane r gives the address of row r."""
    tid = np.arange(32)
    store = """
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 4;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r1};
    """
    load = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];"
    machine = execute(store + "bar.warp.sync -1;" + load, shared=512)
    assert not machine.record.found
    words = machine.shared.memory.data.view(np.uint32)[:32]
    assert np.array_equal(words, tid)
    assert np.array_equal(machine.registers["%r3"], tid)
    four = store.replace("x1", "x4").replace("{%r1}", "{%r1, %r1, %r1, %r1}")
    machine = execute(four + load, shared=512)
    assert np.array_equal(machine.shared.memory.data.view(np.uint32), np.tile(tid, 4))


def test_matrices_that_are_turned():
    """Lane t has elements t // 4 of rows 2 (t % 4) and the next."""
    lane = np.arange(32)
    code = """
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 4;
    mul.lo.s32 %r3, %r1, 0x20002;
    add.s32 %r3, %r3, 0x10000;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r3};
    ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r2];
    """
    machine = execute(code, shared=512)
    low = 8 * (2 * (lane % 4)) + lane // 4  # what stands there is its number, 8 row + column
    assert np.array_equal(machine.registers["%r4"] & 0xFFFF, low)
    assert np.array_equal(machine.registers["%r4"] >> 16, low + 8)
    back = code.replace("stmatrix.sync.aligned.m8n8.x1", "stmatrix.sync.aligned.m8n8.x1.trans")
    machine = execute(back, shared=512)
    assert np.array_equal(machine.registers["%r4"], machine.registers["%r3"])


@pytest.mark.parametrize(
    "code",
    [
        "sin.approx.f32 %r0, %r1;",
        "add.rz.f32 %r0, %r1, %r2;",
        "cvt.rn.satfinite.e4m3x2.f32 %rs0, %r1, %r2;",
        "shfl.sync.bfly.b32 %r0, %r1, 5, 7, -1;",
        "ld.local.b32 %r0, [%rd1];",
        "atom.global.add.f32 %r0, [%rd1], %r2;",
        "add.f32 %r0, %r1, %envreg3;",
        "mov.b64 %rd0, {%rs1, %rs2, %rs3, %rs4};",
        "add.f64 %rd0, %rd1, %rd2;",
        "membar.gl;",
        "trap;",
        "griddepcontrol.wait;",
        "mov.u32 %r0, %clock;",
    ],
)
def test_what_is_not_there_stops_the_machine_by_name(code):
    with pytest.raises(UnknownError, match=re.escape(code.split()[0].rstrip(";"))):
        execute(code)
