"""What a run takes over all of its processes, by accelerate."""

import sys

import torch
from accelerate import Accelerator
from torch import Tensor


class Processes:
    """Those of one run. Whatever the definitions take over a batch goes through here.

    Attributes:
        count: how many there are.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.count: int = accelerator.num_processes
        self._noted: set[str] = set()

    def total(self, sums: Tensor) -> Tensor:
        """Of sums over this process's part of the batch, those over the whole."""
        return sums if self.count == 1 else self._accelerator.reduce(sums, "sum")

    def share(self, sums: Tensor) -> Tensor:
        """What a process divides by, for the mean of the processes to be over the whole batch."""
        return (self.total(sums) / self.count).clamp(min=1e-8)

    def any(self, flag: bool) -> bool:
        """Whether it is set in one of them."""
        if self.count == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=self._accelerator.device)) > 0)

    def means(self, measured: dict[str, Tensor]) -> dict[str, float]:
        """The numbers, averaged over the processes, in one transfer from the device."""
        stacked = torch.stack([value.detach().float() for value in measured.values()])
        numbers = self._accelerator.reduce(stacked, "mean").tolist()
        return dict(zip(measured, numbers, strict=True))

    def note(self, line: str | None) -> None:
        """What the user should know, once and by one process."""
        if line is not None and line not in self._noted:
            self._noted.add(line)
            self._accelerator.print(f"note: {line}", file=sys.stderr)
