"""Which kernel computes loss + gradient, and how it is launched: a table, not a search at run time.

    tier     holds in registers      reads + writes    needs
    token    the H rows of a token   1 + 1             H x BLOCK logits in one CTA
    row      one row                 1 + 1             weights of one row; BLOCK logits in one CTA
    online   nothing                 2 + 1             nothing

BLOCK is the power of two that holds V. What an H100 said of them (benchmarks/README.md):

    logits                           the fastest    why
    float32, as many as fit a CTA    registers      1 + 1 at 73 to 95 % of a copy
    16 bits, rows of <= 8192         registers      1 + 1; a longer row is alone on its SM, which
                                                    loads nothing while it stores
    all others                       online         its second read is from the L2, where the rows
                                                    in flight fit it

In registers a thread holds 64 logits at most 128 registers, or 128 of several rows; on AMD, whose
waves have 64 lanes, 32. More than four rows of a token hold 16384 at most: their edges take
registers too. So does what numerics.py adds: of capped logits half as many are held or fewer, and
of several rows no 128. Clusters of CTAs, which hold longer rows, were slower than online in every
case.

Online, the rows in flight are made few where a long row is read twice:

    rows                              threads   vectors a thread and step   programs an SM
    < 48 KiB                          <= 256    2                           4 and more
    read once                         256       4                           4
    read twice, two programs' bytes   512       4                           2
        an SM fit the L2
    read twice, they do not           1024      4                           1
    of more than one head             the same  2

Without a gradient there is nothing to keep, and nothing is read twice.
"""

import os
from typing import NamedTuple

import torch
import triton

from wmtp.kernels.numerics import is_capped, is_plain, tiles_of
from wmtp.kernels.rows import OPTIONS, VECTOR_BYTES, launch_shape, warp_size

TIERS = ("token", "row", "online")
MOST, MOST_OF_SEVERAL = 32768, 16384  # logits that a CTA holds
MOST_OF_16_BITS = 8192  # that are held sooner than read twice
REGISTERS = 65536  # an NVIDIA SM's
LONG_ROW_BYTES = 48 << 10
L2_SHARE = 0.7  # of the L2 that what was read stays in, beside the gradient that is written


class Machine(NamedTuple):
    """What the choice depends on, of the device."""

    warp_size: int
    processors: int  # SMs
    l2_bytes: int = 50 << 20
    nvidia: bool = True


class Launch(NamedTuple):
    """A kernel of `tier` and what it is launched with."""

    tier: str
    block: int
    num_warps: int
    max_registers: int | None = None  # a thread's

    def options(self) -> dict[str, int]:
        """Triton's; AMD's compiler knows the first two alone."""
        found = {**OPTIONS, "num_warps": self.num_warps}
        if self.max_registers is not None:
            found["maxnreg"] = self.max_registers
        return found


def machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return Machine(32, 1)
    found = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    return Machine(warp_size(device), found.multi_processor_count, found.L2_cache_size, nvidia)


def choose(
    vocab_size: int,
    heads: int,
    rows: int,
    itemsize: int,
    whole_token: bool,
    gradient: bool,
    machine: Machine,
    forced: str = "",
    form: int = 0,
) -> Launch:
    """The launch for rows of V logits.

    Args:
        vocab_size: V.
        heads: H.
        rows: of a token: H, or 1 for shared heads.
        itemsize: bytes of a logit.
        whole_token: the weights follow from the cross entropies of all heads of a token.
        gradient: it is wanted.
        machine: see `machine`.
        forced: a tier's name, for tests and benchmarks.
        form: of numerics.py.

    Raises:
        ValueError: no such tier, or it cannot serve this case.
    """
    if forced and forced not in TIERS:
        raise ValueError(f"WMTP_TRITON_TIER must be one of {', '.join(TIERS)}, got {forced!r}")
    token = whole_token and rows > 1
    if forced == "row" and token:
        raise ValueError(
            "WMTP_TRITON_TIER=row cannot serve weights that need all rows of a token, as those "
            "from ref_ce: use token or online"
        )
    alone = not token and rows == heads
    online = _online(vocab_size, itemsize, rows if token else 1, alone, gradient, machine, form)
    if not gradient:
        return online
    if forced == "online":
        return online
    tier = forced or ("token" if token else "row")
    held = rows if tier == "token" else 1
    found = _in_registers(tier, held, vocab_size, rows < heads, machine, form)
    if found is None and forced:
        raise ValueError(
            f"WMTP_TRITON_TIER={forced} cannot hold {held} x {vocab_size} logits in registers "
            f"here: use online"
        )
    if found and (forced or itemsize == 4 or (not token and found.block <= MOST_OF_16_BITS)):
        return found
    return online


def _in_registers(
    tier: str, rows: int, vocab_size: int, shared: bool, machine: Machine, form: int
) -> Launch | None:
    """The launch that holds so many rows; None where nothing does."""
    block = max(triton.next_power_of_2(vocab_size), 128)
    held = triton.next_power_of_2(rows)
    logits, tiles = block * held, tiles_of(form)
    if logits * tiles > (MOST_OF_SEVERAL if shared or held > 4 else MOST):
        return None
    crowded = logits == MOST and rows > 1
    if crowded and not is_plain(form):
        return None
    of_a_thread = ((128 if crowded else 64) if machine.nvidia else 32) // tiles
    # The edges of several rows are spread over the threads as well: a warp for each, or more.
    fewest = machine.warp_size * (max(held, 4) * min(tiles, 2) if rows > 1 else 1)
    threads = max(logits // of_a_thread, fewest)
    if threads > 1024:
        return None
    one_head = rows == 1 and not shared
    few = one_head and of_a_thread <= 64 and tiles == 1
    most = 128 if few else min(255, REGISTERS // threads)
    return Launch(tier, block, threads // machine.warp_size, _cap(most, machine))


def _cap(registers: int, machine: Machine) -> int | None:
    """NVIDIA's compiler keeps to a limit that it is given; without one it aims lower and spills."""
    return registers if machine.nvidia else None


def in_steps(vocab_size: int, itemsize: int, machine: Machine, form: int = 0) -> Launch:
    """Short rows, or parts of rows: an SM takes several programs; of capped logits one less."""
    shape = launch_shape(vocab_size, itemsize, machine.warp_size)
    return Launch("online", *shape, max_registers=_cap(64 + 16 * is_capped(form), machine))


def out_of_phase(vocab_size: int, itemsize: int, machine: Machine, form: int = 0) -> Launch:
    """Rows that lie otherwise than their gradient: the loads are narrow, and so many that they take
    registers."""
    shape = launch_shape(vocab_size, itemsize, machine.warp_size)
    return Launch("online", *shape, max_registers=_cap(80 + 16 * is_capped(form), machine))


def _online(
    vocab_size: int, itemsize: int, rows: int, alone: bool, twice: bool, machine: Machine, form: int
) -> Launch:
    """Whole rows, of one head's or of more. Of long ones that are read twice few at a time, by
    programs of many threads."""
    row_bytes = vocab_size * itemsize
    if row_bytes < LONG_ROW_BYTES or not machine.nvidia:
        return in_steps(vocab_size, itemsize, machine, form)
    threads, vectors = 256, 4 if alone and not is_capped(form) else 2
    if twice:
        two_programs = 2 * machine.processors * rows * row_bytes
        threads = 512 if two_programs <= L2_SHARE * machine.l2_bytes else 1024
    block = threads * vectors * VECTOR_BYTES.value // itemsize
    return Launch("online", block, threads // machine.warp_size, _cap(64, machine))


def one_program(machine: Machine) -> Launch:
    """Over all tokens: it has an SM to itself."""
    return Launch("", 0, 8, _cap(255, machine))


def splits(vocab_size: int, itemsize: int, programs: int, machine: Machine) -> int:
    """Parts of a row in the online tier: a power of two. More than one where rows are fewer than
    SMs, as long as a part keeps a program busy for four steps of 8 KiB."""
    wanted = min(machine.processors // max(programs, 1), vocab_size * itemsize // 32768)
    return 1 << max(wanted, 1).bit_length() - 1


def constants(launch: Launch, heads: int, rows: int, whole_token: bool) -> dict[str, int | bool]:
    """How a program of the launch divides the work: the kernel's constexprs of these names."""
    together = launch.tier == "token" or (launch.tier == "online" and whole_token and rows > 1)
    shared = rows < heads
    if launch.tier == "online":
        held: dict[str, int | bool] = {"ROWS": rows if together else 1, "SHARED": shared}
    else:
        held = {"ROWS": triton.next_power_of_2(rows) if together else 1}
    return {
        **held,
        "HEADS": triton.next_power_of_2(heads) if together or shared else 1,
        "PROGRAMS": 1 if together or shared else heads,
    }


def forced_tier() -> str:
    return os.environ.get("WMTP_TRITON_TIER", "")
