"""Which kernel computes loss + gradient, and how it is launched: a table, not a search at run time.

    tier     holds in registers      reads + writes    needs
    token    the H rows of a token   1 + 1             H x BLOCK logits in at most 16 CTAs
    row      one row                 1 + 1             weights of one row; BLOCK logits in as many
    online   nothing                 2 + 1             nothing

BLOCK is the power of two that holds V. A program is a cluster of CTAs:

    logits a CTA   a thread   registers   CTAs an SM   when
    <= 16384       64         <= 128      2 and more   one head's row on NVIDIA, mostly: one CTA
                                                       loads while another stores. Preferred, as
                                                       long as the largest cluster suffices: 16,
                                                       on sm_120 8
    <= 16384       64         <= 255      1 and more   several heads in a program
    32768          64         <= 128      1            one head's row, beyond one CTA of 16384
                                                       where there are no clusters
    32768          128        <= 255      1            clusters and several rows: 512 threads of
                                                       128 registers would spill, or fail to compile
    any            32         <= 128      1 and more   AMD, whose 64 lanes do
    online         16 or 8    <= 64       4 and more   enough to have a B200's bytes in flight

More than four rows of a token in one CTA hold 16384 at most: their edges take registers too.
More than one CTA needs Triton >= 3.9 (3.8 fails to reduce across a cluster) and sm_90. Weights
that need the whole token take it; others the row, whose clusters are smaller. Without a
gradient there is nothing to keep, and the online kernel reads once.
"""

import os
from typing import NamedTuple

import torch
import triton

from wmtp.kernels.rows import OPTIONS, launch_shape, warp_size

TIERS = ("token", "row", "online")
PREFERRED, MOST = 16384, 32768  # logits a CTA
REGISTERS = 65536  # an NVIDIA SM's


class Machine(NamedTuple):
    """What the choice depends on, of the device and of Triton."""

    warp_size: int
    most_ctas: int  # of a cluster; 1: none
    processors: int  # SMs
    nvidia: bool = True


class Launch(NamedTuple):
    """A kernel of `tier` and what it is launched with."""

    tier: str
    block: int
    num_warps: int
    num_ctas: int = 1
    max_registers: int | None = None  # a thread's

    def options(self) -> dict[str, int]:
        """Triton's; AMD's compiler knows the first two alone."""
        found = {**OPTIONS, "num_warps": self.num_warps}
        if self.num_ctas > 1:
            found["num_ctas"] = self.num_ctas
        if self.max_registers is not None:
            found["maxnreg"] = self.max_registers
        return found


def machine(device: torch.device) -> Machine:
    if device.type != "cuda":  # the interpreter takes any cluster, and ignores it
        return Machine(32, 16, 1)
    nvidia = torch.version.hip is None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    most_ctas = 1
    if nvidia and triton_reduces_across_clusters():
        most_ctas = largest_cluster(torch.cuda.get_device_capability(device))
    return Machine(warp_size(device), most_ctas, processors, nvidia)


def triton_reduces_across_clusters() -> bool:
    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (3, 9)


def largest_cluster(capability: tuple[int, int]) -> int:
    """CTAs. 8 on every card that has clusters at all; more on the data centre's (sm_90, sm_10x)."""
    if capability < (9, 0):
        return 1
    return 16 if capability < (11, 0) else 8


def choose(
    vocab_size: int,
    heads: int,
    rows: int,
    itemsize: int,
    whole_token: bool,
    gradient: bool,
    machine: Machine,
    forced: str = "",
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

    Raises:
        ValueError: no such tier, or it cannot serve this case.
    """
    if forced and forced not in TIERS:
        raise ValueError(f"WMTP_TRITON_TIER must be one of {', '.join(TIERS)}, got {forced!r}")
    token = whole_token and rows > 1
    below = online(vocab_size, itemsize, machine, 80 if token else 64)
    if forced == "online" or not gradient:
        return below
    tier = forced or ("token" if token else "row")
    if forced == "row" and token:
        raise ValueError(
            "WMTP_TRITON_TIER=row cannot serve weights that need all rows of a token, as those "
            "from ref_ce: use token or online"
        )
    held = rows if tier == "token" else 1
    found = _in_registers(tier, held, vocab_size, rows < heads, machine)
    if found is None and forced:
        raise ValueError(
            f"WMTP_TRITON_TIER={forced} cannot hold {held} x {vocab_size} logits in registers "
            f"here: use online"
        )
    return found or below


def _in_registers(
    tier: str, rows: int, vocab_size: int, shared: bool, machine: Machine
) -> Launch | None:
    """The launch that holds so many rows; None where nothing does."""
    block = max(triton.next_power_of_2(vocab_size), 128)
    held = triton.next_power_of_2(rows)
    logits = block * held
    num_ctas = min(max(logits // PREFERRED, 1), machine.most_ctas)
    logits //= num_ctas
    alone = num_ctas == 1
    if logits > (PREFERRED if shared or (alone and held > 4) else MOST):
        return None
    crowded = logits == MOST and not (alone and rows == 1)
    of_a_thread = (128 if crowded else 64) if machine.nvidia else 32
    # The edges of several rows are spread over the threads as well: a warp for each, or more.
    fewest = machine.warp_size * (max(held, 4) if rows > 1 else 1)
    threads = max(logits // of_a_thread, fewest)
    if threads > 1024:
        return None
    one_head = rows == 1 and not shared
    most = 128 if one_head and of_a_thread <= 64 else min(255, REGISTERS // threads)
    limit = _cap(most, machine) if alone else None  # in clusters it is the limit that spills
    return Launch(tier, block, threads // machine.warp_size, num_ctas, limit)


def _cap(registers: int, machine: Machine) -> int | None:
    """Said, it is a limit to keep to; unsaid, NVIDIA's compiler aims lower, and spills for it."""
    return registers if machine.nvidia else None


def online(vocab_size: int, itemsize: int, machine: Machine, most: int = 64) -> Launch:
    """Rows in steps; the weights of a token's heads take a few registers more."""
    shape = launch_shape(vocab_size, itemsize, machine.warp_size)
    return Launch("online", *shape, max_registers=_cap(most, machine))


def one_program(machine: Machine) -> Launch:
    """Over all tokens: it has an SM to itself."""
    return Launch("", 0, 8, max_registers=_cap(255, machine))


def splits(vocab_size: int, itemsize: int, programs: int, machine: Machine) -> int:
    """Parts of a row in the online tier: a power of two. More than one where rows are fewer than
    SMs, as long as a part keeps a program busy for four steps of 8 KiB."""
    wanted = min(machine.processors // max(programs, 1), vocab_size * itemsize // 32768)
    return 1 << max(wanted, 1).bit_length() - 1


def constants(launch: Launch, heads: int, rows: int, whole_token: bool) -> dict[str, int | bool]:
    """How a program of the launch divides the work: the kernel's constexprs of these names."""
    together = launch.tier == "token" or (launch.tier == "online" and whole_token and rows > 1)
    shared = rows < heads
    all_heads = triton.next_power_of_2(heads)
    if launch.tier == "online":
        held = {"ROWS": rows if together else 1, "SHARED": shared}
    else:
        held = {"ROWS": triton.next_power_of_2(rows) if together else 1}
        held["CLUSTER"] = launch.num_ctas > 1
    return {
        **held,
        "HEADS": all_heads if together or shared else 1,
        "PROGRAMS": 1 if together or shared else heads,
    }


def forced_tier() -> str:
    return os.environ.get("WMTP_TRITON_TIER", "")
