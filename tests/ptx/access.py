"""Loads and stores: of parameters, of global memory, of shared memory, by warps as matrices."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.findings import UnknownError
from ptx.memory import Memory
from ptx.parse import Instruction, Kernel, address, members
from ptx.values import Mask, Read, Step, Values, dtype_of, reader, writer
from ptx.warp import LANES, whole

if TYPE_CHECKING:
    from ptx.machine import Machine

# What is said to the caches, and changes nothing.
HINTS = ("L1::", "L2::", "relaxed", "gpu", "sys", "cta", "weak", "nc", "volatile", "ca", "cg", "cs")
RANK_SHIFT = 24  # in an address of shared::cluster: the rank of the CTA, plus one
OUTSIDE, CROOKED = "outside of memory", "misaligned"


def decode(kernel: Kernel, found: Instruction) -> Step | None:
    base, *rest = found.opcode.split(".")
    if base == "createpolicy":
        return lambda machine, mask: None
    if base == "mapa" and rest == ["shared::cluster", "u32"]:
        return _map_address(kernel, found)
    if base in ("ldmatrix", "stmatrix"):
        return _matrix(kernel, found, base, rest)
    if base not in ("ld", "st") or not rest:
        return None
    space = rest[0]
    words = [word for word in rest[1:] if not word.startswith(HINTS)]
    if base == "ld" and space == "param" and len(words) == 1:
        return _parameter(kernel, found, words[0])
    count = int(words.pop(0)[1:]) if words[0] in ("v2", "v4", "v8") else 1
    if len(words) != 1 or space not in ("global", "shared", "shared::cta", "shared::cluster"):
        return None
    if base == "ld":
        return _load(kernel, found, space, words[0], count)
    return _store(kernel, found, space, words[0], count)


def _parameter(kernel: Kernel, found: Instruction, kind: str) -> Step:
    name, offset = address(found.operands[1])
    number = int(name.rsplit("_", 1)[1])
    if offset:
        raise UnknownError(f"a part of a parameter: {found}")
    write = writer(kernel, found.operands[0], kind)
    dtype = dtype_of(kind)

    def step(machine: "Machine", mask: Mask) -> None:
        write(machine, machine.parameters[number].astype(dtype), mask)

    return step


class Place:
    """The address operand of an access, of `size` bytes."""

    def __init__(self, kernel: Kernel, operand: str, found: Instruction, space: str, size: int):
        base, offset = address(operand)
        self.found, self.size = found, size
        self.is_global = space == "global"
        kind, dtype = ("u64", np.uint64) if self.is_global else ("u32", np.uint32)
        self.read = reader(kernel, base, kind)
        self.offset = dtype(offset % (1 << (64 if self.is_global else 32)))

    def addresses(self, machine: "Machine", lanes: Values | slice) -> Values:
        return machine.spread(self.read(machine) + self.offset)[lanes]

    def pieces(self, machine: "Machine", mask: Mask) -> list[tuple[Memory, Values, Values]]:
        """(memory, lanes, offsets into it) of the accesses that are allowed; others are told."""
        lanes = np.arange(machine.lanes) if mask is None else np.flatnonzero(mask)
        return self.allowed(machine, lanes, self.addresses(machine, lanes))

    def allowed(
        self, machine: "Machine", lanes: Values, addresses: Values
    ) -> list[tuple[Memory, Values, Values]]:
        if not len(lanes):
            return []
        crooked = addresses % self.size != 0
        if crooked.any():
            machine.report(CROOKED, self.found, int(crooked.sum()))
            lanes, addresses = lanes[~crooked], addresses[~crooked]
        if not self.is_global:
            return self._shared(machine, lanes, addresses)
        pieces = []
        for memory, chosen in machine.memory.at(addresses) if len(lanes) else []:
            where = lanes[chosen]
            if memory is None:
                machine.report(OUTSIDE, self.found, len(where))
                continue
            offsets = addresses[chosen].astype(np.int64) - memory.base
            inside = (offsets >= 0) & (offsets + self.size <= len(memory.data))
            if not inside.all():
                machine.report(OUTSIDE, self.found, int((~inside).sum()))
            pieces.append((memory, where[inside], offsets[inside]))
        return pieces

    def _shared(
        self, machine: "Machine", lanes: Values, addresses: Values
    ) -> list[tuple[Memory, Values, Values]]:
        """An address without a rank is the CTA's own."""
        rank = (addresses >> RANK_SHIFT).astype(np.int64) - 1
        own = machine.cta[lanes]
        cta = np.where(rank < 0, own, own // machine.ctas * machine.ctas + rank)
        local = (addresses & ((1 << RANK_SHIFT) - 1)).astype(np.int64)
        inside = (local + self.size <= machine.shared.size) & (rank < machine.ctas)
        if not inside.all():
            machine.report("outside of shared memory", self.found, int((~inside).sum()))
        machine.remote(cta[inside], lanes[inside])
        offsets = (cta - machine.first_cta) * machine.shared.stride + local
        return [(machine.shared.memory, lanes[inside], offsets[inside])]


def _load(kernel: Kernel, found: Instruction, space: str, kind: str, count: int) -> Step:
    targets = members(found.operands[0])
    if len(targets) != count:
        raise UnknownError(f"{count} values for {len(targets)} registers: {found}")
    width = dtype_of(kind).itemsize
    place = Place(kernel, found.operands[1], found, space, width * count)
    writes = [writer(kernel, target, kind) for target in targets]
    dtype, fresh = dtype_of(kind), space != "global"

    def step(machine: "Machine", mask: Mask) -> None:
        values = np.zeros((machine.lanes, count), f"u{width}")
        for memory, lanes, offsets in place.pieces(machine, mask):
            report = machine.reporter(found)
            values[lanes] = memory.load(offsets, width, count, machine.who(lanes), report, fresh)
        for i, write in enumerate(writes):
            write(machine, np.ascontiguousarray(values[:, i]).view(dtype), mask)

    return step


def _store(kernel: Kernel, found: Instruction, space: str, kind: str, count: int) -> Step:
    sources = members(found.operands[1])
    if len(sources) != count:
        raise UnknownError(f"{count} values of {len(sources)} registers: {found}")
    width = dtype_of(kind).itemsize
    place = Place(kernel, found.operands[0], found, space, width * count)
    reads = [reader(kernel, source, f"b{8 * width}") for source in sources]

    def step(machine: "Machine", mask: Mask) -> None:
        for memory, lanes, offsets in place.pieces(machine, mask):
            values = np.stack([machine.spread(read(machine))[lanes] for read in reads], 1)
            memory.store(offsets, values, machine.who(lanes), machine.reporter(found))

    return step


def _map_address(kernel: Kernel, found: Instruction) -> Step:
    """mapa: the same address in the CTA of that rank."""
    target, base, rank = found.operands
    read, read_rank = reader(kernel, base, "u32"), reader(kernel, rank, "u32")
    write = writer(kernel, target, "u32")

    def step(machine: "Machine", mask: Mask) -> None:
        shift = np.uint32(RANK_SHIFT)
        write(machine, read(machine) | (read_rank(machine) + np.uint32(1)) << shift, mask)

    return step


def _matrix(kernel: Kernel, found: Instruction, base: str, rest: list[str]) -> Step | None:
    """Matrices of 8 rows of 16 bytes: lane 8 m + r has the address of row r of matrix m, and lane t
    the elements (t // 4, 2 (t % 4)) and the next of each; .trans: of what stands there turned."""
    turned = "trans" in rest
    words = [word for word in rest if word != "trans"]
    if words[:3] != ["sync", "aligned", "m8n8"] or words[4:] != ["shared", "b16"]:
        return None
    if words[3] not in ("x1", "x2", "x4"):
        return None
    count = int(words[3][1])
    loads = base == "ldmatrix"
    registers, where = found.operands if loads else found.operands[::-1]
    names = members(registers)
    if len(names) != count:
        raise UnknownError(f"{count} matrices in {len(names)} registers: {found}")
    matrices = Matrices(Place(kernel, where, found, "shared", 16), count, turned)
    if loads:
        writes = [writer(kernel, name, "b32") for name in names]
        return lambda machine, mask: matrices.load(machine, mask, writes)
    reads = [reader(kernel, name, "b32") for name in names]
    return lambda machine, mask: matrices.store(machine, mask, reads)


class Matrices:
    def __init__(self, place: Place, count: int, turned: bool):
        self.place, self.count, self.turned = place, count, turned

    def _rows(self, machine: "Machine", mask: Mask) -> list[tuple[Memory, Values, Values]]:
        whole(machine, mask, self.place.found)
        given = np.tile(np.arange(LANES) < 8 * self.count, machine.lanes // LANES)
        return self.place.pieces(machine, given if mask is None else given & mask)

    def load(self, machine: "Machine", mask: Mask, writes: list[Any]) -> None:
        rows = np.zeros((machine.lanes, 4), np.uint32)
        for memory, lanes, offsets in self._rows(machine, mask):
            report = machine.reporter(self.place.found)
            rows[lanes] = memory.load(offsets, 4, 4, machine.who(lanes), report, True)
        halves = rows.view(np.uint16).reshape(-1, 4, 8, 8)  # of each warp, four matrices
        if self.turned:
            halves = halves.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(halves).view(np.uint32)  # [warps, 4, 8, 4]
        for i, write in enumerate(writes):
            write(machine, words[:, i].reshape(-1), mask)

    def store(self, machine: "Machine", mask: Mask, reads: list[Read]) -> None:
        words = np.zeros((machine.lanes // LANES, 4, 8, 4), np.uint32)
        for i, read in enumerate(reads):
            words[:, i] = machine.spread(read(machine)).reshape(-1, 8, 4)
        halves = words.view(np.uint16)
        if self.turned:
            halves = halves.transpose(0, 1, 3, 2)
        rows = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, 4)
        for memory, lanes, offsets in self._rows(machine, mask):
            report = machine.reporter(self.place.found)
            memory.store(offsets, rows[lanes], machine.who(lanes), report)
