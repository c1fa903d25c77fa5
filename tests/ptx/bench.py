"""Pieces of PTX, run alone: what the tests of the machine itself are made of."""

import struct

import numpy as np
import torch

from ptx.findings import Record
from ptx.machine import Compiled, Machine
from ptx.memory import Global
from ptx.parse import parse

MODULE = """
.version 8.8
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry piece(
    {parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
{code}
    ret;
}}
"""


def f32(x: float) -> int:
    """The bits."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


def execute(
    code: str,
    registers: dict[str, object] | None = None,
    *,
    tensors: tuple[torch.Tensor, ...] = (),
    threads: int = 32,
    ctas: int = 1,
    programs: int = 1,
    shared: int = 0,
    cell: int = 1,
) -> Machine:
    """The machine after the code. A register's values are one for all lanes, or one each; the
    tensors' addresses are in %rd1 and on."""
    parameters = ",\n".join(f".param .u64 piece_param_{i}" for i in range(len(tensors)))
    loads = [f"ld.param.b64 %rd{i + 1}, [piece_param_{i}];" for i in range(len(tensors))]
    code = "\n".join([*loads, code])
    kernel = parse(MODULE.format(parameters=parameters, threads=threads, code=code))
    memory = Global()
    machine = Machine(
        Compiled(kernel),
        np.arange(programs),
        (programs, 1, 1),
        ctas,
        [np.array([memory.address(tensor)], np.uint64) for tensor in tensors],
        memory,
        (shared, cell),
        Record(),
    )
    for name, value in (registers or {}).items():
        held = machine.registers["%" + name]
        given = np.atleast_1d(np.array(value))
        bits = 8 * held.itemsize
        if held.dtype != np.bool_:
            given = np.array([int(x) & ((1 << bits) - 1) for x in given], held.dtype)
        machine.registers["%" + name] = given
    machine.run()
    return machine


def result(code: str, target: str, **registers: object) -> int:
    """What lane 0 has in a register."""
    machine = execute(code, registers)
    return int(machine.registers["%" + target][0])
