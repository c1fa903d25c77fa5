"""What the GPU suite times, in which order, and how long an H100 is predicted to take for it.

A job is a case of problem.py, and what its kernels are forced into, if anything. The order is that
of importance: time may run out.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from wmtp.benchmarks.gpu_peers import PEERS
from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.providers import DIRECTIONS
from wmtp.benchmarks.report import logits_bytes
from wmtp.benchmarks.static_variants import CARDS, Card

VOCABULARIES = (32000, 50257, 128256, 256000)
DTYPES = ("bfloat16", "float32")
TOKENS, HEADS = 1024, 4  # 4096 rows
WEIGHED = 128256  # at this V ours are timed under every weighting
OURS = ("fused", "fused_inplace")
TIERS = ("token", "row", "online")
# Of a dtype: ours beside the copy and eager torch, then whoever is quick to be ready.
ORDER = (
    *(*OURS, "copy", "eager"),
    *("liger", "compiled", "eager_float", "quack", "flash_attn", "linear_cross_entropy"),
    "cce_kernel",  # tunes itself for every size
)

PREDICTED_CARD = CARDS["cuda:90"]
COPY_SHARE = 0.9  # of the data sheet's bandwidth: what a device-to-device copy gets


class Job(NamedTuple):
    """One row of the table."""

    case: Case
    tier: str = ""  # forced; "": as the library chooses
    ctas_per_sm: int = 0  # of the tier `row`, forced as well; 0: as the library chooses


def forced_as(tier: str, ctas_per_sm: int) -> str:
    """
    >>> forced_as("row", 2), forced_as("row", 1), forced_as("online", 0)
    ('row, 2 CTAs an SM', 'row, 1 CTA an SM', 'online')
    """
    if not ctas_per_sm:
        return tier
    return f"{tier}, {ctas_per_sm} CTA{'s' * (ctas_per_sm > 1)} an SM"


def speed_jobs(absent: Iterable[str] = ()) -> list[Job]:
    """Everyone who is here at every vocabulary, the most important first."""
    jobs = [
        _job("speed", vocabulary, dtype, direction, provider, "none" if peer else "given")
        for dtype in DTYPES
        for vocabulary in VOCABULARIES
        for direction in DIRECTIONS
        for provider in _contestants(direction, dtype)
        for peer in [provider in PEERS]
        if provider not in absent
    ]
    jobs += [
        _job("speed", WEIGHED, dtype, direction, OURS[direction == "inplace"], weighting)
        for dtype in DTYPES
        for weighting in ("ref_ce", "uniform")
        for direction in DIRECTIONS
    ]
    return sorted(jobs, key=importance)  # stable: cases of one problem stay together


def importance(job: Job) -> tuple[int, int]:
    """Place in the order: the dtype's, and the provider's, ours and its yardsticks being one."""
    place = max(ORDER.index(job.case.provider), ORDER.index("eager"))
    return DTYPES.index(job.case.dtype), place


def tier_jobs() -> list[Job]:
    """Each tier forced at the same size: a card decides between them."""
    return [
        _job("tiers", vocabulary, dtype, direction, provider, weighting)._replace(tier=tier)
        for dtype in DTYPES
        for direction, provider in (("forward+backward", "fused"), ("inplace", "fused_inplace"))
        for vocabulary in VOCABULARIES
        for weighting in ("given", "ref_ce")
        for tier in TIERS
        if (tier, weighting) != ("row", "ref_ce")  # excess weights need the whole token
    ]


def launch_of(job: Job, machine: Any) -> Any:
    """The launch (tier, block, warps) of one of OURS.

    Args:
        job: provider of OURS.
        machine: see wmtp.kernels.tiers.

    Raises:
        ValueError: the forced tier cannot serve the case.
    """
    from wmtp.kernels import tiers

    case = job.case
    _, _, heads, vocabulary = case.shape
    whole_token, gradient = case.weighting == "ref_ce", case.direction != "forward"
    return tiers.choose(
        vocab_size=vocabulary,
        heads=heads,
        rows=heads,
        itemsize=_itemsize(case),
        whole_token=whole_token,
        gradient=gradient,
        machine=machine,
        forced=job.tier,
    )


def predicted_ms(job: Job, card: Card = PREDICTED_CARD) -> float | None:
    """The roofline: what must be moved over the bandwidth of a copy; None for other people's code.

    Launches take no time here, and no kernel stalls: a bound to compare with, not a measurement.
    """
    moved = _moved(job, card)
    if moved is None:
        return None
    return 1e3 * moved * logits_bytes(job.case) / (COPY_SHARE * card.bytes_a_second)


def predicted_tier(job: Job, card: Card = PREDICTED_CARD) -> str:
    """ "" where none can serve, or none is ours."""
    from wmtp.kernels.tiers import Machine

    if job.case.provider not in OURS:
        return ""
    try:
        return launch_of(job, Machine(32, card.processors, card.l2_bytes)).tier
    except ValueError:
        return ""


def _moved(job: Job, card: Card) -> int | None:
    """Reads and writes of the logits, from and to memory."""
    case = job.case
    if case.provider == "copy":
        return 2
    tier = predicted_tier(job, card)
    if not tier:
        return None
    if case.direction == "forward":
        return 1
    return 3 if tier == "online" and _rereads_from_memory(job, card) else 2


def _rereads_from_memory(job: Job, card: Card) -> bool:
    """Whether what the online kernel's programs have under way exceeds the L2."""
    from wmtp.kernels.tiers import L2_SHARE, Machine

    case = job.case
    batch, length, heads, vocabulary = case.shape
    rows_a_program = heads if case.weighting == "ref_ce" else 1
    launch = launch_of(job, Machine(32, card.processors, card.l2_bytes))
    registers = 32 * launch.num_warps * launch.max_registers
    programs = min(
        batch * length * heads // rows_a_program, card.processors * (card.registers // registers)
    )
    in_flight = programs * rows_a_program * vocabulary * _itemsize(case)
    return in_flight > L2_SHARE * card.l2_bytes


def _contestants(direction: str, dtype: str) -> list[str]:
    """Without what is the same as another in float32; the copy is timed once a problem."""
    same = ("cce", "eager_float") if dtype == "float32" else ("cce",)  # its kernel is a peer
    providers = [name for name in DIRECTIONS[direction] if name not in same]
    if direction == "forward+backward":
        providers.append("copy")
    providers += [] if direction == "inplace" else list(PEERS)
    return sorted(providers, key=ORDER.index)


def _job(
    study: str, vocabulary: int, dtype: str, direction: str, provider: str, weighting: str
) -> Job:
    shape = (1, TOKENS, HEADS, vocabulary)
    return Job(Case(study, shape, dtype, direction, provider, weighting))


def _itemsize(case: Case) -> int:
    return {"bfloat16": 2, "float32": 4}[case.dtype]
