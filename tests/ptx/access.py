"""Loads and stores: of parameters, of global memory, of shared memory, by warps as matrices."""

from typing import TYPE_CHECKING

import numpy as np

from ptx.findings import UnknownError
from ptx.memory import Memory
from ptx.parse import Instruction, Kernel, address, members
from ptx.values import Mask, Step, Values, dtype_of, reader, writer
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
        self.offset = dtype(offset)

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
    the word t % 4 of row t // 4 of each."""
    if rest[:3] != ["sync", "aligned", "m8n8"] or rest[-2:] not in (["shared", "b16"],):
        return None
    if len(rest) != 6 or rest[3] not in ("x1", "x2", "x4"):
        return None
    count = int(rest[3][1])
    loads = base == "ldmatrix"
    registers, where = found.operands if loads else found.operands[::-1]
    place = Place(kernel, where, found, "shared", 16)
    lane = np.arange(LANES)

    def rows(machine: "Machine", mask: Mask) -> list[tuple[Memory, Values, Values]]:
        whole(machine, mask, found)
        given = np.tile(lane < 8 * count, machine.lanes // LANES)
        return place.pieces(machine, given if mask is None else given & mask)

    def load(machine: "Machine", mask: Mask) -> None:
        words = np.zeros((machine.lanes, 4), np.uint32)
        for memory, lanes, offsets in rows(machine, mask):
            report = machine.reporter(found)
            words[lanes] = memory.load(offsets, 4, 4, machine.who(lanes), report, True)
        of_warps = words.reshape(-1, LANES, 4)
        for i, write in enumerate(writes):
            write(machine, of_warps[:, 8 * i + lane // 4, lane % 4].reshape(-1), mask)

    def store(machine: "Machine", mask: Mask) -> None:
        words = np.zeros((machine.lanes // LANES, LANES, 4), np.uint32)
        for i, read in enumerate(reads):
            values = machine.spread(read(machine)).reshape(-1, LANES)
            words[:, 8 * i + lane // 4, lane % 4] = values
        for memory, lanes, offsets in rows(machine, mask):
            values = words.reshape(-1, 4)[lanes]
            memory.store(offsets, values, machine.who(lanes), machine.reporter(found))

    names = members(registers)
    if len(names) != count:
        raise UnknownError(f"{count} matrices in {len(names)} registers: {found}")
    if loads:
        writes = [writer(kernel, name, "b32") for name in names]
        return load
    reads = [reader(kernel, name, "b32") for name in names]
    return store
