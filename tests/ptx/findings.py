"""What the machine has to say about a kernel."""

from collections import Counter
from typing import Any, NamedTuple


class Finding(NamedTuple):
    kernel: str
    kind: str
    where: str  # the source line, and the instruction

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind}, at {self.where}"


class UnknownError(Exception):
    """An instruction, or a form of it, that the machine does not have."""


class Record:
    """Findings, each once with its number of lanes; and what was run."""

    def __init__(self) -> None:
        self.found: Counter[Finding] = Counter()
        self.counts: Counter[str] = Counter()

    def add(self, kernel: str, kind: str, instruction: Any, lanes: int = 1) -> None:
        self.found[Finding(kernel, kind, str(instruction))] += lanes

    def taken(self) -> tuple[list[str], dict[str, int]]:
        """The findings and counts since the last time."""
        found = self.lines(), dict(self.counts)
        self.found.clear()
        self.counts.clear()
        return found

    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.found}

    def lines(self) -> list[str]:
        return [f"{finding} ({lanes} lanes)" for finding, lanes in self.found.items()]
