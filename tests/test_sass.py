"""What is read from a disassembly."""

import json

import pytest

from wmtp.benchmarks.sass import innermost_loops, loads_in_flight, parse, passes
from wmtp.benchmarks.static_table import add_table

LOOPS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00000a00ff017624 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.EF.128 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   FADD R12, R8, R4 ;
        /*0050*/              @!P0 BRA 0x20 ;
        /*0060*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0070*/                   FMUL R4, R4, R13 ;
        /*0080*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0090*/               @P1 BRA 0x60 ;
        /*00a0*/               @P2 BRA 0x10 ;
        /*00b0*/                   BRA 0xd0 ;
        /*00c0*/                   NOP ;
        /*00d0*/                   EXIT ;
"""


def test_innermost_loops_are_those_of_a_branch_backwards():
    loops = innermost_loops(parse(LOOPS))
    assert [(loop[0].address, loop[-1].address) for loop in loops] == [(0x20, 0x50), (0x60, 0x90)]


def test_loads_count_until_one_of_them_is_used():
    first, second = innermost_loops(parse(LOOPS))
    assert loads_in_flight(first) == 2
    assert loads_in_flight(second) == 1
    assert loads_in_flight(second[1:2]) == 0


def test_a_loop_that_loads_nothing_is_no_pass():
    zeros = "/*0100*/ STG.E.128 [R2.64], RZ ;\n/*0110*/ @P0 BRA 0x100 ;"
    assert passes(parse(zeros)) == []
    assert len(passes(parse(LOOPS + zeros))) == 2


@pytest.mark.parametrize("versions", [["3.6.0"], ["3.9.0", "3.6.0"]])
def test_tables_stand_beside_one_another(tmp_path, versions):
    file = tmp_path / "sass.json"
    for version in versions:
        add_table(file, version, [{"kernel": "online known", "in_flight": [2, 2]}])
    assert list(json.loads(file.read_text())) == sorted(versions)
