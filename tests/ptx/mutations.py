"""Kernels that are broken on purpose, to see that the machine sees it. As a program it prints what
becomes of a kernel without each of its barriers:

    WMTP_KERNELS_ON=sm_90a python -m ptx.mutations            in tests/
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from ptx.launch import Driver
from support.agreement import kernel_gradient, kernel_loss
from wmtp import kernels
from wmtp.kernels import tiers
from wmtp.numerics import numerics_of

# A barrier of a cluster is an arrival and a wait: both go.
BARRIER = re.compile(
    r"\bbar\.sync[^;]*;|\bbarrier\.cluster\.arrive[^;]*;\s*barrier\.cluster\.wait[^;]*;"
)
Run = Callable[[], object]
Scenario = tuple[Run, str, int]  # what it does; the tier that is forced; processors


class Removal(NamedTuple):
    kernel: str
    titles: list[str]  # of the scenarios that launch it
    number: int  # of the barrier in it
    instruction: str
    line: str  # of the source
    kinds: list[str]  # what was found; nothing: not seen


def problem(
    vocabulary: int, dtype: torch.dtype, heads: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tokens; their targets lie in the edges of a row, and between."""
    torch.manual_seed(0)
    logits = torch.randn(1, 3 + heads, heads, vocabulary).to(dtype)
    target_ids = torch.randint(vocabulary, (1, 3 + heads))
    target_ids[0, 1:4] = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    return logits, target_ids


def loss(
    vocabulary: int, dtype: torch.dtype = torch.bfloat16, excess: bool = False, heads: int = 4
) -> Run:
    """In place, where nothing of a row may be written before all of it that is needed is read."""

    def run() -> None:
        logits, target_ids = problem(vocabulary, dtype, heads)
        ref_ce = 4 * torch.rand(target_ids.shape[1] - 1)[None] if excess else None
        weights = None if excess else 1 + torch.rand(logits.shape[:3])
        reduction = "token_mean" if excess else "weight_mean"
        how = {"reduction": reduction, "gradient": "inplace"}
        kernel_loss(kernels, logits, target_ids, weights, ref_ce, **how)

    return run


def loss_of_a_form(vocabulary: int, excess: bool = False) -> Run:
    """In place, with all that numerics.py has; rows without weight among them."""

    def run() -> None:
        logits, target_ids = problem(vocabulary, torch.bfloat16)
        ref_ce = 4 * torch.rand(target_ids.shape[1] - 1)[None] if excess else None
        weights = None if excess else 1 + torch.rand(logits.shape[:3])
        if weights is not None:
            weights[0, 0, 1] = 0.0
        if ref_ce is not None:
            ref_ce[0, 1] = 200.0  # this far off, the other heads' weights are 0
        how = {"numerics": numerics_of(softcap=20.0, z_loss=1e-3, label_smoothing=0.1)}
        how |= {"reduction": "token_mean" if excess else "sum", "gradient": "inplace"}
        kernel_loss(kernels, logits, target_ids, weights, ref_ce, metrics=True, **how)

    return run


def many_tokens(excess: bool = False, normalizer: float | None = None) -> Run:
    """Several steps of the kernels over all tokens; a denominator so small that the weights are
    stored once more, in another unit."""

    def run() -> None:
        torch.manual_seed(0)
        logits, target_ids = torch.randn(2, 600, 4, 9), torch.randint(9, (2, 600))
        weights = None if excess else 1e-38 * (1 + torch.rand(logits.shape[:3]))
        ref_ce = torch.rand(2, 599) if excess else None
        reduction = "token_mean" if excess else "weight_mean" if normalizer is None else "sum"
        how = {"reduction": reduction, "gradient": "none", "normalizer": normalizer}
        kernel_loss(kernels, logits, target_ids, weights, ref_ce, **how)

    return run


def gradient(vocabulary: int, shared: bool = False) -> Run:
    def run() -> None:
        logits, target_ids = problem(vocabulary, torch.bfloat16)
        if shared:
            logits = logits[:, :, :1].expand(-1, -1, 4, -1)
        of_rows = torch.rand(3, *logits.shape[:3])
        kernel_gradient(kernels, logits, target_ids, *of_rows)

    return run


def scaling() -> None:
    logits, _ = problem(1001, torch.bfloat16)
    kernels.multiply_(logits[..., 3:], torch.tensor(2.5))


@contextlib.contextmanager
def forced(tier: str, processors: int = 1) -> Iterator[None]:
    """Of a device with so many processors: rows are split where they are fewer."""
    machine = tiers.machine
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WMTP_TRITON_TIER", tier)
        patch.setattr(tiers, "machine", lambda on: machine(on)._replace(processors=processors))
        yield


SCENARIOS: dict[str, Scenario] = {
    "row": (loss(8000), "row", 1),
    "row, 4 bytes": (loss(4001, torch.float32), "row", 1),
    "token": (loss(4001, excess=True), "token", 1),
    "token, 5 heads": (loss(2001, excess=True, heads=5), "token", 1),
    "online": (loss(8001), "online", 1),
    "online, token": (loss(8001, excess=True), "online", 1),
    "online, 512 threads": (loss(32001), "online", 132),
    "online, token, 1024 threads": (loss(32001, excess=True), "online", 132),
    "split": (loss(65537), "online", 64),
    "split, token": (loss(65537, excess=True, heads=3), "online", 64),
    "row, of a form": (loss_of_a_form(4001), "row", 1),
    "token, of a form": (loss_of_a_form(2001, excess=True), "token", 1),
    "online, of a form": (loss_of_a_form(4001), "online", 1),
    "online, token, of a form": (loss_of_a_form(4001, excess=True), "online", 1),
    "split, of a form": (loss_of_a_form(65537), "online", 64),
    "many tokens": (many_tokens(), "", 1),
    "many tokens, sum": (many_tokens(normalizer=1e-38), "", 1),
    "many tokens, excess": (many_tokens(excess=True), "", 1),
    "gradient": (gradient(8001), "", 1),
    "gradient, shared": (gradient(8001, shared=True), "", 1),
    "scale": (scaling, "", 1),
}


def texts(driver: Driver, scenario: Scenario) -> list[str]:
    """The PTX of each kernel that is launched."""
    found: list[str] = []

    def note(text: str) -> str:
        if text not in found:
            found.append(text)
        return text

    execute(driver, scenario, note)
    return found


def execute(
    driver: Driver, scenario: Scenario, change: Callable[[str], str] | None = None
) -> list[str]:
    """Runs it with its kernels changed: the kinds of findings."""
    run, tier, processors = scenario
    driver.record.found.clear()
    driver.change = change
    try:
        with forced(tier, processors):
            run()
    finally:
        driver.change = None
    kinds = sorted(driver.record.kinds())
    driver.record.found.clear()
    return kinds


def removals(driver: Driver, chosen: dict[str, Scenario]) -> Iterator[Removal]:
    """Each barrier of each binary that the scenarios launch, removed alone, until one sees it."""
    binaries: dict[str, list[str]] = {}
    for title, scenario in chosen.items():
        for text in texts(driver, scenario):
            binaries.setdefault(text, []).append(title)
    for text, titles in binaries.items():
        for number, barrier in enumerate(BARRIER.finditer(text)):
            without = text[: barrier.start()] + text[barrier.end() :]
            kinds: list[str] = []
            for title in titles:
                kinds = kinds or execute(driver, chosen[title], replacing(text, without))
            name, line = _where(text[: barrier.start()])
            yield Removal(name, titles, number, barrier[0].split()[0].rstrip(";"), line, kinds)


def replacing(text: str, other: str) -> Callable[[str], str]:
    return lambda each: other if each == text else each


def _where(before: str) -> tuple[str, str]:
    """(kernel, source line) where such a beginning of its PTX ends."""
    name = re.search(r"\.entry\s+(\w+)", before)
    lines = re.findall(r"// ((?!standard)\w+\.py:\d+)", before)
    return name[1] if name else "", lines[-1] if lines else ""


def main() -> None:
    import os

    from ptx import launch

    driver = launch.install(os.environ["WMTP_KERNELS_ON"])
    chosen = SCENARIOS
    for title, scenario in chosen.items():
        if first := execute(driver, scenario):
            print(f"{title}, as it is: {'; '.join(first)}")
    found = list(removals(driver, chosen))
    for removal in found:
        print(removal.kernel, removal.titles[0], *removal[2:5], end=": ")
        print("; ".join(removal.kinds) or "NOT SEEN")
    print(f"{sum(bool(removal.kinds) for removal in found)} of {len(found)} removals seen")


if __name__ == "__main__":
    main()
