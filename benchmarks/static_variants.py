"""Which binaries the library can ask of Triton's compiler, and the cards they are for.

A variant is one specialisation; two calls that would run the same binary are one variant.

    H             1, 2, 3, 4, 5, 8; the logits of each head, or one row of logits for all of them;
                  of weights every H up to 8
    V             one of each class of block: a row in less than a CTA, in one, in none
    loss          known weights and excess, each tier that serves them, with and without gradient
    at V = 50257  few rows (split), heads in memory of their own (listed), gradients that lie
                  otherwise than the logits (out of phase), signed excess: the last three of H = 4
    forms         what numerics.py makes of logits and beside: those of FORMS, of H = 4, in two
                  dtypes and some V
    weights       every weighting x reduction; dtype and normaliser are no part of the binary
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
VOCABULARIES = (
    *(1000, 2000, 4000, 8000, 16000, 32000, 50257, 128256, 151936, 152064, 256000, 300000),
)
ODD = 50257
HEADS = (1, 2, 3, 4, 5, 8)
# What logits and losses may have besides (numerics.py), alone and together.
FORMS = {
    "scaled": ("SCALED",),
    "capped": ("CAPPED",),
    "capped smoothed": ("CAPPED", "SMOOTHED"),
    "smoothed squared": ("SMOOTHED", "SQUARED"),
    "measured": ("MEASURED",),
    "everything": ("CAPPED", "SMOOTHED", "SQUARED", "MEASURED"),
}
FORM_DTYPES, FORM_VOCABULARIES = ("fp32", "bf16"), (1000, 8000, 16000, 32000, ODD, 128256)
# By what they are called, the functions of wmtp.weightings; None: the weights are known.
SIGNED = "excess._signed_excess"
RULES = {"known": None, "excess": "excess._absolute_excess"}  # of wmtp.weightings


class Card(NamedTuple):
    """What a target's SM has, and one card's bandwidth and SMs, from its data sheet."""

    name: str
    registers: int
    threads: int
    shared_bytes: int
    bytes_a_second: float
    latency: float
    processors: int
    l2_bytes: int

    def needed_bytes(self) -> int:
        """In flight an SM, for the latency to be hidden."""
        return round(self.bytes_a_second * self.latency / self.processors)


CARDS = {
    "cuda:80": Card("A100", 65536, 2048, 164 << 10, 2.0e12, 600e-9, 108, 40 << 20),
    "cuda:90": Card("H100", 65536, 2048, 228 << 10, 3.35e12, 600e-9, 132, 50 << 20),
    "cuda:100": Card("B200", 65536, 2048, 228 << 10, 8.0e12, 700e-9, 148, 126 << 20),
    "hip:gfx942": Card("MI300X", 131072, 2048, 64 << 10, 5.3e12, 800e-9, 304, 4 << 20),
}


class Variant(NamedTuple):
    """One binary."""

    name: str
    dtype: str
    vocabulary: int  # the first that it serves
    kernel: Any
    constants: dict[str, Any]
    launch: Any  # tiers.Launch
    streams_logits: bool = False
    stores_logits: bool = False

    def specialisation(self) -> tuple[Any, ...]:
        """What one binary is told from another by."""
        return (self.kernel, self.dtype, self.launch[1:], *sorted(self.constants.items()))

    def kind(self) -> str:
        """The class of which a sample holds one."""
        return f"{self.name.split()[0]} of a form" if self.constants.get("FORM") else self.name


def variants(modules: dict[str, Any], target: str, once: bool = True) -> Iterator[Variant]:
    """Every binary that the launchers can ask for on this target.

    Args:
        once: one that serves several vocabularies stands for all of them.
    """
    found = set()
    for variant in _variants(modules, machine(modules, target)):
        if not once or variant.specialisation() not in found:
            found.add(variant.specialisation())
            yield variant


def sample(every: list[tuple[str, Variant]], size: int, seed: str) -> list[tuple[str, Variant]]:
    """One of each kind, then others up to `size`. Which target, H, V and dtype stands for a kind is
    drawn by lot: the same for the same seed."""

    def lot(number: int) -> str:
        return hashlib.sha256(f"{seed} {number}".encode()).hexdigest()

    drawn = [every[number] for number in sorted(range(len(every)), key=lot)]
    kinds = set()
    chosen: list[tuple[str, Variant]] = []
    others: list[tuple[str, Variant]] = []
    for target, variant in drawn:
        (others if variant.kind() in kinds else chosen).append((target, variant))
        kinds.add(variant.kind())
    return chosen + others[: max(size - len(chosen), 0)]


def machine(modules: dict[str, Any], target: str) -> Any:
    tiers, card = modules["tiers"], CARDS[target]
    nvidia = target.startswith("cuda")
    return tiers.Machine(32 if nvidia else 64, card.processors, card.l2_bytes, nvidia)


def _variants(modules: dict[str, Any], machine: Any) -> Iterator[Variant]:
    for heads in HEADS:
        for dtype in ITEMSIZE:
            for vocabulary in VOCABULARIES:
                yield from _loss_variants(modules, machine, dtype, vocabulary, heads)
            for vocabulary in (1000, ODD):  # streaming in steps: two classes
                yield from _streaming_variants(modules, machine, dtype, vocabulary, heads)
    for form, options in FORMS.items():
        code = sum(getattr(modules["numerics"], option).value for option in options)
        for dtype in FORM_DTYPES:
            for vocabulary in FORM_VOCABULARIES:
                for variant in _loss_variants(modules, machine, dtype, vocabulary, 4, code):
                    yield variant._replace(name=f"{variant.name} {form}")
            for variant in _streaming_variants(modules, machine, dtype, ODD, 4, code):
                yield variant._replace(name=f"{variant.name} {form}")
    for heads in range(1, max(HEADS) + 1):
        yield from _small_variants(modules, machine, heads)


def _loss_variants(
    modules: dict[str, Any], machine: Any, dtype: str, vocabulary: int, heads: int, form: int = 0
) -> Iterator[Variant]:
    """The loss: by weighting, one or all heads a row, with its gradient or without, by tier."""
    tiers = modules["tiers"]
    for weighting in ("known", "excess"):
        for rows in sorted({heads, 1}, reverse=True):
            for gradient in (True, False):
                for forced in ("", *tiers.TIERS):
                    try:
                        launch = tiers.choose(
                            vocabulary, heads, rows, ITEMSIZE[dtype], RULES[weighting] is not None,
                            gradient, machine, forced, form,
                        )  # fmt: skip
                    except ValueError:  # that tier does not serve this case
                        continue
                    variant = _loss_variant(
                        modules, dtype, vocabulary, launch, weighting, (heads, rows), gradient, form
                    )
                    yield variant
                    if vocabulary == ODD:
                        yield from _further(modules, variant, machine)


def _loss_variant(
    modules: dict[str, Any],
    dtype: str,
    vocabulary: int,
    launch: Any,
    weighting: str,
    size: tuple[int, int],
    gradient: bool,
    form: int,
) -> Variant:
    (heads, rows), rule = size, RULES[weighting]
    constants = modules["tiers"].constants(launch, heads, rows, rule is not None)
    constants |= {"H": heads, "RULE": rule, "COMPARES": rule is not None, "IN_PHASE": True}
    constants |= {"LISTED": False, "GRAD_LISTED": False, "BLOCK": launch.block}
    constants |= {"MULTIPLIED": False, "BY_HEAD": False, "FORM": form}
    constants |= {"OTHER": None, "OTHER_NUMBERS": 1}
    name, kernel = "register", modules["register_kernel"].register_kernel
    if launch.tier != "online":
        constants["SUMS_TO_ONE"] = rule is not None
    else:
        name, kernel = "online", modules["online_kernel"].online_kernel
        count = modules["partial_kernel"].statistics_of(form)
        constants |= {"GRAD": gradient, "COUNT": count, "SPLITS": 1}
    name += f" {weighting}" + " shared" * (rows < heads) + " forward" * (not gradient)
    return Variant(name, dtype, vocabulary, kernel, constants, launch, True, gradient)


def _further(modules: dict[str, Any], variant: Variant, machine: Any) -> Iterator[Variant]:
    """What changes little of the stream, each on its own."""
    constants = variant.constants
    gradient, of_four = variant.stores_logits, constants["H"] == 4
    itemsize = ITEMSIZE[variant.dtype]
    if variant.launch.tier == "online" and (gradient or of_four):
        steps = modules["tiers"].in_steps(variant.vocabulary, itemsize, machine, constants["FORM"])
        yield from _split(modules, variant, steps)
    if not (gradient and of_four):
        return
    online = variant.launch.tier == "online"
    own_sum = {} if online else {"SUMS_TO_ONE": False}
    more: dict[str, dict[str, Any]] = {
        "listed": {"LISTED": True, "GRAD_LISTED": True},
        "out of phase": {"IN_PHASE": False},
        "signed": {"RULE": SIGNED},
        "dpace": {"RULE": "dpace._dpace", "COMPARES": False, **own_sum},
        "product": {"OTHER": "dft._probability", **own_sum},
        "dft": {"RULE": "dft._probability", **own_sum},
        "focal": {"RULE": "focal._focal", **own_sum},
        "gate": {"RULE": "entropy_gate._gate", **own_sum},
        "by head": {"BY_HEAD": True},
        "multiplied": {"MULTIPLIED": True, **own_sum},
    }
    if "shared" in variant.name:
        del more["listed"]
    known, form = constants["RULE"] is None, constants["FORM"]
    of_tokens, of_rows = ("signed", "dpace", "product", "multiplied"), ("dft", "focal")
    for name in (*of_tokens, "gate") if known else (*of_rows, "gate"):
        if name != "gate" or not (known and form & modules["numerics"].MEASURED.value):
            del more[name]
    if form:
        more = {name: more[name] for name in ("out of phase", "gate") if name in more}
    for name, changed in more.items():
        launch = variant.launch
        if online and name == "out of phase":
            launch = modules["tiers"].out_of_phase(variant.vocabulary, itemsize, machine, form)
        changed |= {"BLOCK": launch.block}
        name = f"{variant.name} {name}"
        yield variant._replace(name=name, constants=constants | changed, launch=launch)


def _split(modules: dict[str, Any], variant: Variant, launch: Any) -> Iterator[Variant]:
    """The same for rows fewer than the SMs."""
    shared = "shared" in variant.name
    constants = variant.constants | {"SPLITS": 8, "BLOCK": launch.block}
    variant = variant._replace(launch=launch)
    name = f"{variant.name} split"
    # Its part of the logits is read for the gradient alone.
    yield variant._replace(name=name, constants=constants, streams_logits=variant.stores_logits)
    of_parts = {
        "H": constants["H"],
        "HEADS": constants["HEADS"] if shared else 1,
        "ROWS": 1 if shared else constants["H"],
        "LISTED": False,
        "EVICT": "evict_last" if constants["GRAD"] else "evict_first",
        "FORM": constants["FORM"],
        "COUNT": constants["COUNT"],
        "SPLITS": constants["SPLITS"],
        "BLOCK": constants["BLOCK"],
    }
    kernel = modules["partial_kernel"].partial_kernel
    name = "partial" + " shared" * shared
    yield variant._replace(name=name, kernel=kernel, constants=of_parts, stores_logits=False)


def _streaming_variants(
    modules: dict[str, Any], machine: Any, dtype: str, vocabulary: int, heads: int, form: int = 0
) -> Iterator[Variant]:
    """The kernels of the cross entropies themselves."""
    tiers = modules["tiers"]
    launch = tiers.in_steps(vocabulary, ITEMSIZE[dtype], machine, form)
    block = {"BLOCK": launch.block}
    gradient = modules["gradient_kernel"].row_gradient_kernel
    for shared in (False, True)[:heads]:
        name = "row_gradient" + " shared" * shared
        for in_phase in (True, False) if (vocabulary, heads) == (ODD, 4) else (True,):
            constants = {"H": heads, "SHARED_HEADS": shared, "IN_PHASE": in_phase, **block}
            constants["FORM"] = form
            yield Variant(
                name + " out of phase" * (not in_phase),
                *(dtype, vocabulary, gradient, constants, launch, True, True),
            )


def _small_variants(modules: dict[str, Any], machine: Any, heads: int) -> Iterator[Variant]:
    """Those that stream no logits."""
    weights, tiers = modules["weights_kernel"], modules["tiers"]
    once, alone = tiers.Launch("", 0, 8), tiers.one_program(machine)
    tokens: dict[str, Any] = {"H": heads, "TOKENS": weights.tokens_a_step(heads)}
    kernel = weights.weights_kernel
    for kind in ("ONES", "GIVEN", "LATER"):
        for by_head in (False, True):
            of_kind: dict[str, Any] = {"WEIGHTS": getattr(weights, kind).value, **tokens}
            of_kind["BY_HEAD"] = by_head
            suffix = " by head" * by_head
            for reduction, code in weights.REDUCTIONS.items():
                if by_head and reduction != "sum":
                    continue
                name, constants = f"weights {kind.lower()} {reduction}{suffix}", dict(of_kind)
                constants["REDUCTION"] = code.value
                yield Variant(name, "fp32", 0, kernel, constants, alone)
            name = f"finish {kind.lower()}{suffix}"
            yield Variant(name, "fp32", 0, weights.finish_kernel, of_kind, alone)
    scale = modules["scale_kernel"].scale_kernel
    for dtype, itemsize in ITEMSIZE.items():
        block = {"BLOCK": modules["scale_kernel"].BLOCK_BYTES // itemsize}
        yield Variant("scale", dtype, 0, scale, block, once)
