"""What the GPU suite times, in which order, and how long an H100 is predicted to take for it.

The order is that of importance: time may run out. By study:

    speed       everyone at every vocabulary
    linear      hidden states to loss and gradients, against the bare products and peers
    tiers       each tier forced: a card decides between them
"""

import math
from itertools import product
from typing import Any, NamedTuple

from wmtp.benchmarks.problem import Case, Shape, plan_of
from wmtp.benchmarks.providers import DIRECTIONS, FLOORS, LINEAR, LOGITS, OURS, PEERS, absent
from wmtp.benchmarks.static_variants import CARDS, Card

BOTH = "forward+backward"
DTYPES = ("bfloat16", "float32")
VOCABULARIES = (32000, 50257, 128256, 256000)
TOKENS, HEADS = 1024, 4  # 4096 rows
WEIGHED = 128256  # at this V ours are timed under every weighting
TIERS = ("token", "row", "online")
# Of a dtype: ours beside the copy and eager torch, then whoever is quick to be ready.
ORDER = (
    *(*OURS, "copy", "eager"),
    *("liger", "compiled", "eager_float", "quack", "flash_attn", "linear_cross_entropy"),
    "cce_kernel",  # tunes itself for every size
)
# [B, S, H, V] and D of Llama 3 8B, Llama 2 7B, and Gemma 2 2B as Cut Cross Entropy's table has it.
LINEAR_SIZES: tuple[tuple[Shape, int], ...] = (
    ((1, 1024, 4, 128256), 4096),
    ((1, 1024, 4, 32000), 4096),
    ((1, 2048, 4, 256000), 2304),
)
# Those who are timed after ours, the bare products and eager torch, in this order.
LATE = ("compiled", "eager_float", "linear_cross_entropy", "cce", "liger")

PREDICTED_CARD = CARDS["cuda:90"]
COPY_SHARE = 0.9  # of the data sheet's bandwidth: what a device-to-device copy gets
PRODUCT_SHARE = 0.74  # of the data sheet's operations: what a large product gets
FLOPS = 989e12  # a second, of dense bfloat16 products: its data sheet's
LANES_A_SECOND = 128 * 1.7e9  # instructions of a thread that an SM issues
INSTRUCTIONS = {"forward": 8, "online": 15, "row": 18, "token": 18}  # a logit: results/sass.json
LAUNCHES = 12e-6  # seconds: three kernels, one after the other
WAVE = 1e-6  # seconds: a program's first loads, and the barriers between its passes
WAIT = 1e-3  # seconds: what the linear loss enqueues after its one wait comes so much later


def all_cases() -> dict[str, list[Case]]:
    """Of the steps that time something; of others whoever is here."""
    missing = absent({**LOGITS, **PEERS})
    linear = absent(LINEAR)
    return {
        "speed": [case for case in speed_cases() if case.provider not in missing],
        "linear": [case for case in linear_cases() if case.provider not in linear],
        "tiers": tier_cases(),
    }


# --- cases ---------------------------------------------------------------------------------------


def speed_cases() -> list[Case]:
    """The most important first; cases of one problem together."""
    cases = [
        _case("speed", vocabulary, dtype, direction, provider, "none" if peer else "given")
        for dtype in DTYPES
        for vocabulary in VOCABULARIES
        for direction in DIRECTIONS
        for provider in _contestants(direction, dtype)
        for peer in [provider in PEERS]
    ]
    cases += [
        _case("speed", WEIGHED, dtype, direction, OURS[direction == "inplace"], weighting)
        for dtype in DTYPES
        for weighting in ("ref_ce", "uniform")
        for direction in DIRECTIONS
    ]
    return sorted(cases, key=importance)


def importance(case: Case) -> tuple[int, int]:
    """Place in the order: the dtype's, and the provider's, ours and its yardsticks being one."""
    place = max(ORDER.index(case.provider), ORDER.index("eager"))
    return DTYPES.index(case.dtype), place


def _contestants(direction: str, dtype: str) -> list[str]:
    """Without what is the same as another in float32; the copy is timed once a problem."""
    same = ("cce", "eager_float") if dtype == "float32" else ("cce",)  # its kernel is a peer
    providers = [name for name in DIRECTIONS[direction] if name not in same]
    providers += ["copy"] if direction == BOTH else []
    providers += [] if direction == "inplace" else list(PEERS)
    return sorted(providers, key=ORDER.index)


def tier_cases() -> list[Case]:
    return [
        _case("tiers", vocabulary, dtype, direction, provider, weighting)._replace(tier=tier)
        for dtype in DTYPES
        for direction, provider in ((BOTH, "fused"), ("inplace", "fused_inplace"))
        for vocabulary in VOCABULARIES
        for weighting in ("given", "ref_ce")
        for tier in TIERS
        if (tier, weighting) != ("row", "ref_ce")  # excess weights need the whole token
    ]


def linear_cases() -> list[Case]:
    """Ours, the products and eager torch at every size, then the peers: one of these may take
    minutes to tune itself, or a second a call."""
    ours = [
        *((BOTH, "fused", weighting) for weighting in ("uniform", "given", "ref_ce")),
        *((direction, floor, "uniform") for direction, floor in FLOORS.items()),
        ("frozen", "fused", "uniform"),
        (BOTH, "eager", "uniform"),
    ]
    return [
        Case("linear", shape, DTYPES[0], *contestant, dim=dim)
        for contestants in (ours, *([(BOTH, peer, "uniform")] for peer in LATE))
        for (shape, dim), contestant in product(LINEAR_SIZES, contestants)
    ]


def _case(
    study: str, vocabulary: int, dtype: str, direction: str, provider: str, weighting: str
) -> Case:
    shape = (1, TOKENS, HEADS, vocabulary)
    return Case(study, shape, dtype, direction, provider, weighting)


# --- launches ------------------------------------------------------------------------------------


def launch_of(case: Case, machine: Any) -> Any:
    """The launch (tier, block, warps) of one of OURS.

    Args:
        machine: see wmtp.kernels.tiers.

    Raises:
        ValueError: the forced tier cannot serve the case.
    """
    from wmtp.kernels import tiers

    _, _, heads, vocabulary = case.shape
    return tiers.choose(
        vocab_size=vocabulary,
        heads=heads,
        rows=heads,
        itemsize=case.torch_dtype.itemsize,
        whole_token=case.weighting == "ref_ce",
        gradient=case.direction != "forward",
        machine=machine,
        forced=case.tier,
    )


# --- predictions ---------------------------------------------------------------------------------


def predicted_ms(case: Case, card: Card = PREDICTED_CARD) -> float | None:
    """From bytes, instructions, waves and launches, by the constants above; None for other
    people's code. An H100's times are within 20 % of it (tests/test_gpu_cases.py)."""
    if case.dim:
        return _predicted_linear_ms(case)
    if case.provider == "copy":
        return 1e3 * _seconds(2 * case.logits_bytes(), card)
    tier = predicted_tier(case, card)
    if not tier:
        return None
    under_way = _under_way(case, card)
    forward = case.direction == "forward"
    moved = 1.0 if forward else 2.0
    if tier == "online" and not forward:  # what the L2 cannot hold is read twice
        moved += 1 - min(1.0, under_way.fits)
    instructions = INSTRUCTIONS["forward" if forward else tier] * math.prod(case.shape)
    issued = instructions / (LANES_A_SECOND * card.processors)
    seconds = max(_seconds(moved * case.logits_bytes(), card), issued)
    return 1e3 * (seconds + LAUNCHES + WAVE * under_way.waves)


def predicted_tier(case: Case, card: Card = PREDICTED_CARD) -> str:
    """Of one of ours; "" where it cannot serve, and of others."""
    if case.provider not in OURS or case.dim:
        return ""
    try:
        return launch_of(case, _machine(card)).tier
    except ValueError:
        return ""


def _machine(card: Card) -> Any:
    from wmtp.kernels.tiers import Machine

    return Machine(32, card.processors, card.l2_bytes)


class UnderWay(NamedTuple):
    """The programs of a launch, as the device takes them."""

    waves: int
    fits: float  # the share of the L2 that holds what they read, over what they read


def _under_way(case: Case, card: Card) -> UnderWay:
    from wmtp.kernels.tiers import L2_SHARE

    batch, length, heads, vocabulary = case.shape
    rows_a_program = heads if case.weighting == "ref_ce" else 1
    launch = launch_of(case, _machine(card))
    registers = 32 * launch.num_warps * launch.max_registers
    at_once = card.processors * (card.registers // registers)
    programs = batch * length * heads // rows_a_program
    program_bytes = rows_a_program * vocabulary * case.torch_dtype.itemsize
    in_flight = min(programs, at_once) * program_bytes
    return UnderWay(-(-programs // at_once), L2_SHARE * card.l2_bytes / in_flight)


def _predicted_linear_ms(case: Case) -> float | None:
    """Chunk by chunk."""
    rows = _rows(case)
    if case.provider in FLOORS.values():
        return 1e3 * _products_seconds(case, rows, 0, False)
    if case.provider != "fused":
        return None
    linear = plan_of(case.shape, case.dim, case.torch_dtype)
    linear = linear._replace(weight_wanted=case.direction != "frozen")
    chunks = -(-rows // (linear.chunk_tokens * case.shape[2]))
    summed = chunks > 1 and case.direction != "frozen"
    seconds = sum(
        _products_seconds(case, rows // chunks, number, summed) for number in range(chunks)
    )
    moved = 2 * rows * case.shape[3] * linear.dtype.itemsize  # the kernel, in place
    if summed:
        moved += linear.weight.numel() * (linear.accum_dtype.itemsize + linear.dtype.itemsize)
    return 1e3 * (seconds + _seconds(moved) + WAIT)


def products_flops(case: Case) -> int:
    """Of the products of the rows with a target: 2 D V a row for each."""
    count = 2 if case.direction == "frozen" else 3
    return count * 2 * _rows(case) * case.dim * case.shape[3]


def _products_seconds(case: Case, rows: int, number: int, summed: bool) -> float:
    """The products of chunk `number`; the weight's gradient is added to a sum, or written."""
    vocabulary, itemsize = case.shape[3], case.torch_dtype.itemsize
    logits, x, weight = rows * vocabulary, rows * case.dim, vocabulary * case.dim
    moved = [itemsize * (logits + x + weight)] * 2
    if case.direction != "frozen":
        gradient = 4 * weight * (1 + (number > 0)) if summed else itemsize * weight
        moved.append(itemsize * (logits + x) + gradient)
    operations = 2 * rows * vocabulary * case.dim / (PRODUCT_SHARE * FLOPS)
    return sum(max(operations, _seconds(count)) for count in moved)


def _seconds(moved: float, card: Card = PREDICTED_CARD) -> float:
    return moved / (COPY_SHARE * card.bytes_a_second)


def _rows(case: Case) -> int:
    """With a target: head k has none in the last k + 1 tokens."""
    batch, length, heads, _ = case.shape
    return batch * sum(max(length - 1 - head, 0) for head in range(heads))
