"""What only a card can tell: one or two CTAs an SM that keep a row in registers, or reading twice.

    CTAs an SM   logits a CTA   threads   registers   a row of more logits
    1            32768          512       128         a cluster of CTAs; without clusters one CTA
    2            16384          256       128         of all its logits, 64 a thread, in the
                                                      registers that are left to it: it spills

Each vocabulary's variants get the same logits, and must return the same.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from wmtp.benchmarks.gpu_cases import DTYPES, Job, forced_as
from wmtp.benchmarks.problem import Case

STUDY = "occupancy"
VOCABULARIES = (32000, 50257, 128256, 152064)
TOKENS, HEADS = 4096, 4
# Logits, a copy, two gradients, and what comparing these in float32 takes, in units of the logits.
COPIES = 12
MEMORY = 80e9  # where there is no card
REGISTERS = 65536  # an SM's
FEWEST_REGISTERS, MOST_THREADS, LOGITS_A_THREAD = 64, 1024, 64


def occupancy_jobs(memory: float | None = None) -> list[Job]:
    """Online first: the others are compared with it.

    Args:
        memory: bytes of the card.
    """
    if memory is None:
        found = torch.cuda.is_available()
        memory = torch.cuda.get_device_properties().total_memory if found else MEMORY
    return [
        Job(Case(STUDY, shape, DTYPES[0], "forward+backward", provider), *forced)
        for vocabulary in VOCABULARIES
        for shape in [(1, tokens_that_fit(vocabulary, memory), HEADS, vocabulary)]
        for provider, *forced in (
            ("fused", "online"),
            ("fused", "row", 1),
            ("fused", "row", 2),
            ("copy",),
        )
    ]


def tokens_that_fit(vocabulary: int, memory: float) -> int:
    """
    >>> tokens_that_fit(152064, 80e9), tokens_that_fit(152064, 40e9)
    (4096, 2048)
    """
    tokens = TOKENS
    while tokens > 1 and COPIES * 2 * tokens * HEADS * vocabulary > memory:
        tokens //= 2
    return tokens


def launch(vocabulary: int, ctas_per_sm: int, machine: Any) -> Any:
    """The row tier's launch.

    Raises:
        ValueError: such a row needs a cluster, or more registers than there are.
    """
    import triton

    from wmtp.kernels import tiers

    block = triton.next_power_of_2(vocabulary)
    held = min(tiers.MOST // ctas_per_sm, block)
    num_ctas = block // held
    if num_ctas > machine.most_ctas == 1:
        held, num_ctas = block, 1
    threads = held // LOGITS_A_THREAD
    registers = min(REGISTERS // (threads * ctas_per_sm), 128)
    if threads > MOST_THREADS or registers < FEWEST_REGISTERS or num_ctas > machine.most_ctas:
        raise ValueError(
            f"{forced_as('row', ctas_per_sm)}: {vocabulary} logits need a cluster, that is a "
            f"Triton that reduces across it, or --cubins"
        )
    return tiers.Launch("row", block, threads // machine.warp_size, num_ctas, registers)


@contextlib.contextmanager
def forced_launch(job: Job, device: str) -> Iterator[None]:
    """The library launches the job's row so; as it chooses, where the job says nothing of it."""
    if not job.ctas_per_sm:
        yield
        return
    from wmtp.kernels import tiers

    machine = tiers.machine(torch.device(device))
    chosen = launch(job.case.shape[3], job.ctas_per_sm, machine)
    choose = tiers.choose
    tiers.choose = lambda *_, **__: chosen
    try:
        yield
    finally:
        tiers.choose = choose
