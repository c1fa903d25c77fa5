"""Memory that knows its bounds, what each access wants of its address, and who was there before.

Each storage of the arguments has addresses of its own, far from every other's: an access that
leaves it meets nothing. The low bits are the true ones, so that misaligned accesses are seen;
storages that are listed together (the heads of a list) are as far apart as they are.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ptx.races import Shadow, Who

GROUP = 48  # bits of a true address; those above it name the storage, or the list of them
LARGEST_WATCHED = 1 << 28  # bytes; larger storages, sparse files, are watched for bounds alone

Report = Callable[[str, int], None]


class Memory:
    """Bytes, and their shadow in cells of `cell` bytes."""

    def __init__(self, data: np.ndarray, base: int, cell: int, watched: bool = True):
        self.data = data
        self.base = base
        self.cell = cell
        self.watched = watched
        self.shadow = Shadow(len(data) // cell + 2) if watched else None
        self.views: dict[int, tuple[np.ndarray, int]] = {}

    def seen_as(self, itemsize: int) -> None:
        """By another argument, perhaps as smaller elements."""
        if self.watched and itemsize < self.cell:
            self.cell = itemsize
            self.shadow = Shadow(len(self.data) // itemsize + 2)

    def view(self, width: int) -> tuple[np.ndarray, int]:
        """Elements of this width, and the offset of the first: at a multiple of it."""
        if width not in self.views:
            skip = -self.base % width
            count = max(len(self.data) - skip, 0) // width
            found = self.data[skip : skip + count * width].view(f"u{width}")
            self.views[width] = (found, skip)
        return self.views[width]

    def _places(self, offsets: np.ndarray, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        view, skip = self.view(width)
        return view, ((offsets - skip) // width)[:, None] + np.arange(count)

    def _cells(self, offsets: np.ndarray, size: int) -> np.ndarray:
        begin = (offsets + self.base % self.cell) // self.cell
        return (begin[:, None] + np.arange(max(size // self.cell, 1))).reshape(-1)

    def load(
        self, offsets: np.ndarray, width: int, count: int, who: Who, report: Report, fresh: bool
    ) -> np.ndarray:
        """[n, count]. `fresh`: the memory holds nothing before it is written."""
        view, places = self._places(offsets, width, count)
        if self.shadow is not None and len(offsets):
            cells = self._cells(offsets, width * count)
            if fresh and (unwritten := ~self.shadow.written(cells)).any():
                report("reads shared memory before it is written", int(unwritten.sum()))
            race = self.shadow.read(cells, who.of_cells(len(cells) // len(offsets)))
            if race.any():
                report("race: reads what another warp writes", int(race.sum()))
        return view[places]

    def store(self, offsets: np.ndarray, values: np.ndarray, who: Who, report: Report) -> None:
        """values [n, count]."""
        width, count = values.itemsize, values.shape[1]
        view, places = self._places(offsets, width, count)
        if self.shadow is not None and len(offsets):
            cells = self._cells(offsets, width * count)
            each = len(cells) // len(offsets)
            race = self.shadow.write(cells, who.of_cells(each))
            if race.any():
                report("race: writes what another warp touches", int(race.sum()))
        view[places] = values
        lost = view[places] != values
        if lost.any():
            report("lanes write different bits to one place", int(lost.sum()))


class Global:
    """The storages of a launch's arguments. `listed` are reached from any one of them."""

    def __init__(self, listed: Sequence[torch.UntypedStorage] = ()) -> None:
        self.groups: list[list[Memory]] = []
        self.known: dict[int, Memory] = {}
        self.listed = {storage.data_ptr(): storage for storage in listed}

    def address(self, tensor: torch.Tensor) -> int:
        """Of the tensor's first element."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            together = self.listed if storage.data_ptr() in self.listed else {0: storage}
            self.groups.append([])
            for one in together.values():
                self._add(one, tensor.element_size())
        memory = self.known[storage.data_ptr()]
        memory.seen_as(tensor.element_size())
        return memory.base + int(tensor.storage_offset()) * tensor.element_size()

    def _add(self, storage: torch.UntypedStorage, cell: int) -> None:
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        base = (len(self.groups) << GROUP) + storage.data_ptr()
        memory = Memory(data, base, cell, len(data) <= LARGEST_WATCHED)
        self.known[storage.data_ptr()] = memory
        self.groups[-1].append(memory)

    def at(self, addresses: np.ndarray) -> list[tuple[Memory | None, np.ndarray]]:
        """The memories that these lie in, or beside (the first of a group), each with which do."""
        names = addresses >> np.uint64(GROUP)
        found: list[tuple[Memory | None, np.ndarray]] = []
        for name in np.unique(names).tolist() if (names != names[0]).any() else [int(names[0])]:
            left = names == name
            if not 0 < name <= len(self.groups):
                found.append((None, left))
                continue
            for memory in self.groups[name - 1][1:]:
                begin, end = np.uint64(memory.base), np.uint64(memory.base + len(memory.data))
                inside = left & (addresses >= begin) & (addresses < end)
                found.append((memory, inside))
                left = left & ~inside
            found.append((self.groups[name - 1][0], left))
        return found


class Shared:
    """Of each CTA `size` bytes; one memory for all."""

    def __init__(self, ctas: int, size: int, cell: int):
        self.size = size
        self.stride = -(-size // 16) * 16
        self.memory = Memory(np.zeros(ctas * self.stride, np.uint8), 0, cell)
