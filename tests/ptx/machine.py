"""Programs, run together: one array element a thread.

Lanes go block by block. Of those that could go on, the ones lowest in the code do, so that lanes
that have parted meet again. At a barrier lanes wait until none can go on.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.findings import Record
from ptx.memory import Global, Report, Shared
from ptx.opcodes import condition, decode
from ptx.parse import Instruction, Kernel
from ptx.races import Who
from ptx.values import Mask, Step, Values
from ptx.warp import LANES

WAITING, GONE = 1 << 20, 1 << 30  # added to the block's number; beyond all blocks
LANES_AT_ONCE = 1 << 14
End = Callable[["Machine", Mask], None]


class Compiled:
    """A kernel whose instructions are functions."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.blocks: list[tuple[list[Step], End, int]] = []
        for number, block in enumerate(kernel.blocks):
            # What ends a block is the last of it; others run on into the next.
            last = block[-1] if block and block[-1].ends_block() else None
            plain = block[:-1] if last else block
            steps = [step for step in (self._step(found) for found in plain) if step]
            self.blocks.append((steps, self._end(last, number), len(block)))

    def _step(self, found: Instruction) -> Step | None:
        if found.opcode == "barrier.cluster.arrive.aligned":
            return arrive
        return decode(self.kernel, found)

    def _end(self, last: Instruction | None, number: int) -> End:
        if last is None:
            return lambda machine, mask: machine.go(number + 1, mask)
        word = last.opcode.split(".")[0]
        if word in ("ret", "exit"):
            return leaving(last, number)
        if word == "bra":
            return branching(last, self.kernel.labels[last.operands[-1]], number)
        return waiting(last, number)


def arrive(machine: "Machine", mask: Mask) -> None:
    machine.arrived += 1 if mask is None else mask


def branching(last: Instruction, target: int, number: int) -> End:
    def end(machine: "Machine", mask: Mask) -> None:
        if last.guard is None:
            return machine.go(target, mask)
        chosen = machine.spread(condition(machine, last.guard))
        here = chosen if mask is None else chosen & mask
        machine.go(number + 1, mask)
        machine.go(target, here)

    return end


def leaving(last: Instruction, number: int) -> End:
    def end(machine: "Machine", mask: Mask) -> None:
        if last.guard is None:
            return machine.go(GONE, mask)
        chosen = machine.spread(condition(machine, last.guard))
        machine.go(number + 1, mask)
        machine.go(GONE, chosen if mask is None else chosen & mask)

    return end


def waiting(last: Instruction, number: int) -> End:
    assert last.guard is None, f"a barrier for some: {last}"
    assert last.operands in ((), ("0",)), f"a barrier of its own: {last}"

    def end(machine: "Machine", mask: Mask) -> None:
        machine.barriers[number] = last
        machine.go(WAITING + number, mask)

    return end


class Machine:
    """One batch of programs of a launch."""

    def __init__(
        self,
        compiled: Compiled,
        programs: Values,  # their numbers, x first
        grid: tuple[int, int, int],
        ctas: int,
        parameters: list[Values],
        memory: Global,
        shared: tuple[int, int],  # bytes of a CTA, and of a cell
        record: Record,
    ):
        kernel = compiled.kernel
        self.compiled, self.kernel, self.parameters = compiled, kernel, parameters
        self.memory, self.record, self.ctas = memory, record, ctas
        threads = kernel.threads
        of_program = threads * ctas
        self.lanes = len(programs) * of_program
        lane = np.arange(self.lanes)
        self.program = programs[lane // of_program]
        rank = lane // threads % ctas
        self.cta = self.program * ctas + rank
        self.first_cta = int(programs[0]) * ctas
        self.warp = self.cta * (threads // LANES) + lane % threads // LANES
        self.shared = Shared(len(programs) * ctas, *shared)
        self.epoch = np.zeros(self.lanes, np.int64)
        self.arrived = np.zeros(self.lanes, np.int64)
        self.waited = np.zeros(self.lanes, np.int64)
        self.read_from: dict[int, int] = {}  # a CTA: arrivals at the last read by another
        self.barriers: dict[int, Instruction] = {}
        self.special = self._special(lane, grid, rank)
        self.registers = Registers(kernel)
        self.at = np.zeros(self.lanes, np.int32)

    def _special(self, lane: Values, grid: tuple[int, int, int], rank: Values) -> dict[str, Values]:
        x, y, z = grid
        inside = lane % self.kernel.threads
        zero, one = np.zeros(1, np.uint32), np.ones(1, np.uint32)
        named = {
            "%tid.x": inside,
            "%laneid": inside % LANES,
            "%ctaid.x": self.program % x * self.ctas + rank,
            "%ctaid.y": self.program // x % y,
            "%ctaid.z": self.program // (x * y),
            "%cluster_ctarank": rank,
            "%ntid.x": np.array([self.kernel.threads]),
            "%nctaid.x": np.array([x * self.ctas]),
            "%nctaid.y": np.array([y]),
            "%nctaid.z": np.array([z]),
        }
        found = {name: value.astype(np.uint32) for name, value in named.items()}
        return found | {"%tid.y": zero, "%tid.z": zero, "%ntid.y": one, "%ntid.z": one}

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while (low := int(self.at.min())) < GONE:
                if low >= WAITING:
                    self._release()
                    continue
                here = self.at == low
                mask = None if here.all() else here
                steps, end, count = self.compiled.blocks[low]
                self.record.counts["instructions"] += count
                for step in steps:
                    step(self, mask)
                end(self, mask)
        self._check_exits()

    def go(self, block: int, mask: Mask) -> None:
        if mask is None:
            self.at = np.full(self.lanes, block, np.int32)
        else:
            self.at = np.where(mask, np.int32(block), self.at)

    def spread(self, value: Values) -> Values:
        """One element a lane."""
        return value if len(value) == self.lanes else np.broadcast_to(value, (self.lanes,))

    def who(self, lanes: Values) -> Who:
        fields = (self.warp, self.cta, self.program, self.epoch, self.arrived, self.waited)
        return Who(*(field[lanes] for field in fields))

    def report(self, kind: str, found: Any, lanes: int = 1) -> None:
        self.record.add(self.kernel.name, kind, found, lanes)

    def reporter(self, found: Instruction) -> Report:
        return lambda kind, lanes: self.report(kind, found, lanes)

    def remote(self, cta: Values, lanes: Values) -> None:
        """Notes who reads the shared memory of another CTA."""
        if self.ctas == 1:
            return
        other = cta != self.cta[lanes]
        for owner in np.unique(cta[other]):
            last = int(self.arrived[lanes[other & (cta == owner)]].max())
            self.read_from[int(owner)] = max(last, self.read_from.get(int(owner), -1))

    def _release(self) -> None:
        """All that can wait does. A barrier is of a CTA or of a cluster, and all must be there."""
        number = self.at - WAITING
        for block in np.unique(number[number < GONE - WAITING]):
            found = self.barriers[int(block)]
            here = number == block
            cluster = found.opcode.startswith("barrier.cluster")
            group = self.kernel.threads * (self.ctas if cluster else 1)
            torn = here.reshape(-1, group)
            torn = torn.any(1) & ~torn.all(1)
            if torn.any():
                self.report("a barrier that not all come to", found, int(torn.sum()))
            self.epoch += here
            if cluster:
                self.waited += here
            self.go(int(block) + 1, here)

    def _check_exits(self) -> None:
        """A CTA that has gone has no shared memory: its readers must have passed a barrier that it
        has waited for."""
        for owner, arrived in self.read_from.items():
            waited = self.waited[self.cta == owner]
            if (waited <= arrived).any():
                self.report("leaves while its shared memory may still be read", f"CTA {owner}")


class Registers(dict[str, Values]):
    """Nothing is 0 for all lanes."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def __missing__(self, name: str) -> Values:
        from ptx.values import width

        return np.zeros(1, width(self.kernel, name))
