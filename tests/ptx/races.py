"""Who touched a place last, and whether a barrier lies between.

For every cell of memory the last write and the reads since are kept: whose (warp), and after how
many barriers of its CTA (epoch) and how many arrivals at the barrier of its cluster. Two touches of
different warps, one of them a write, are a race unless

    same CTA        a barrier of the CTA between them: the later epoch is the higher
    same cluster    a barrier of the cluster: the later one has waited more often than the earlier
                    one had arrived
    else            never in one launch

A program is a cluster, mostly of one CTA.
"""

from typing import NamedTuple

import numpy as np

NOBODY, MANY = -1, -2


class Who(NamedTuple):
    """Of each touching lane [n] or cell [n, k]."""

    warp: np.ndarray  # of the launch
    cta: np.ndarray
    program: np.ndarray
    epoch: np.ndarray
    arrived: np.ndarray
    waited: np.ndarray

    def of_cells(self, count: int) -> "Who":
        """The same for each of `count` cells of a lane, flat."""
        return Who(*(np.repeat(field, count) for field in self))

    def at(self, chosen: np.ndarray) -> "Who":
        return Who(*(field[chosen] for field in self))


class Touches:
    """The last touch of each cell, of one kind."""

    def __init__(self, cells: int):
        # Memory that is not touched costs nothing: its pages are never there.
        self.warp = np.zeros(cells, np.int32)  # warp + 1: 0 is nobody
        self.cta = np.zeros(cells, np.int32)
        self.program = np.zeros(cells, np.int32)
        self.epoch = np.zeros(cells, np.int32)
        self.arrived = np.zeros(cells, np.int32)

    def whose(self, cells: np.ndarray) -> np.ndarray:
        return self.warp[cells] - 1

    def before(self, cells: np.ndarray, who: Who) -> np.ndarray:
        """Whether a barrier lies between these touches and this one."""
        of_cta = (self.cta[cells] == who.cta) & (self.epoch[cells] < who.epoch)
        of_cluster = (self.program[cells] == who.program) & (self.arrived[cells] < who.waited)
        return of_cta | of_cluster

    def set(self, cells: np.ndarray, who: Who) -> None:
        self.warp[cells] = who.warp + 1
        self.cta[cells] = who.cta
        self.program[cells] = who.program
        self.epoch[cells] = who.epoch
        self.arrived[cells] = who.arrived

    def add(self, cells: np.ndarray, who: Who) -> None:
        """Reads by several: what must be waited for is the last of them."""
        held = self.whose(cells)
        alone = (held == NOBODY) | (held == who.warp) | self.before(cells, who)
        self.set(cells[alone], who.at(alone))
        if not alone.all():
            self._join(cells[~alone], who.at(~alone))
        others = self.whose(cells) != who.warp  # by lanes of this very instruction, too
        if others.any():
            self._join(cells[others], who.at(others))

    def _join(self, cells: np.ndarray, who: Who) -> None:
        self.warp[cells] = MANY + 1
        self.cta[cells] = np.where(self.cta[cells] == who.cta, who.cta, MANY)
        self.program[cells] = np.where(self.program[cells] == who.program, who.program, MANY)
        np.maximum.at(self.epoch, cells, who.epoch)
        np.maximum.at(self.arrived, cells, who.arrived)


class Shadow:
    """Of one memory."""

    def __init__(self, cells: int):
        self.writes = Touches(cells)
        self.reads = Touches(cells)

    def written(self, cells: np.ndarray) -> np.ndarray:
        return self.writes.warp[cells] != 0

    def read(self, cells: np.ndarray, who: Who) -> np.ndarray:
        """Which of these reads are races with a write before them."""
        writer = self.writes.whose(cells)
        race = (writer != NOBODY) & (writer != who.warp)
        if race.any():
            race &= ~self.writes.before(cells, who)
        self.reads.add(cells, who)
        return race

    def write(self, cells: np.ndarray, who: Who) -> np.ndarray:
        """Which of these writes are races with a touch before them. Lanes that write to one place
        in one instruction are none: whether their bits differ is another question."""
        race = np.zeros(len(cells), bool)
        for touches in (self.writes, self.reads):
            held = touches.whose(cells)
            other = (held != NOBODY) & (held != who.warp)
            if other.any():
                race |= other & ~touches.before(cells, who)
        self.writes.set(cells, who)
        self.reads.warp[cells] = 0
        return race
