"""A machine that executes PTX, with NumPy: what Triton's compiler makes of the kernels runs, and is
watched, where there is no card.

    parse.py      text -> blocks of instructions
    values.py     how operands are read and written
    integer.py, floating.py, convert.py, warp.py, access.py     the instructions, by group
    opcodes.py    all of them by name; what is not there stops the machine
    machine.py    lanes, divergence, barriers
    memory.py     bounds, alignment, shared memory that nobody has written
    races.py      who touched what since which barrier
    launch.py     in place of Triton's driver, on CPU tensors

A register is an array over all threads of many programs, or over one where all hold the same.
Semantics are those of NVIDIA's PTX ISA; where it leaves the last bit open (ex2.approx, lg2.approx,
div.full) the correctly rounded result is taken, or the C library's.
"""
