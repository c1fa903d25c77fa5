"""The checkpoints of a run: folders step-N, each with the digests of its files.

A checkpoint is whole when the digests are there and all files answer to them. Only whole ones are
resumed from, and only our own names are ever touched: a copy that somebody keeps stays.
"""

import math
import re
import shutil
from pathlib import Path

from wmtp.digests import DIGESTS, what_is_wrong, write_digests
from wmtp.files import TEMPORARY, rename_folder
from wmtp.trainers.errors import RunError


class Checkpoints:
    """Those in one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[int]:
        """Of all that are finished, whole or not, in order; nothing is lost with an empty one."""
        filled = [path.name for path in self.path.glob("step-*") if any(path.glob("*"))]
        found = [re.fullmatch(r"step-(0|[1-9]\d*)", name) for name in filled]
        return sorted(int(match[1]) for match in found if match)

    def newest_whole(self, recorded: float = math.inf) -> tuple[tuple[int, Path] | None, list[str]]:
        """The newest whole one and the step it was taken after, and what is wrong with newer ones.

        Args:
            recorded: how many steps have their record; one that was taken later is passed over.

        Raises:
            RunError: there are some, and none is whole.
        """
        complaints: list[str] = []
        for step in reversed(self.steps()):
            path = self._named(step)
            wrong = what_is_wrong(path)
            if wrong is not None:
                complaints.append(f"{path} is damaged ({wrong})")
            elif step > recorded:
                complaints.append(f"{path} is ahead of metrics.jsonl, which lacks {recorded + 1}")
            else:
                return (step, path), complaints
        if complaints:
            raise RunError(
                f"no whole checkpoint: {'; '.join(complaints)}: restore one, or delete "
                f"{self.path} to start anew"
            )
        return None, complaints

    def in_progress(self, step: int) -> Path:
        """Where the state after `step` is written before it has its name."""
        return self.path / f"step-{step}{TEMPORARY}"

    def begin(self, step: int) -> None:
        """Make `in_progress` an empty folder."""
        temporary = self.in_progress(step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def commit(self, step: int) -> None:
        """Write the digests of `in_progress` and give it its name, in place of what has it."""
        temporary, final = self.in_progress(step), self._named(step)
        write_digests(temporary)
        if final.exists():
            _remove(final)
        rename_folder(temporary, final)

    def drop_old(self, keep_last: int) -> None:
        """All but the last `keep_last` that are finished."""
        finished = [step for step in self.steps() if (self._named(step) / DIGESTS).is_file()]
        for step in finished[:-keep_last]:
            _remove(self._named(step))

    def _named(self, step: int) -> Path:
        return self.path / f"step-{step}"


def _remove(folder: Path) -> None:
    # Renamed first: a kill inside rmtree must not leave half a checkpoint under its name.
    doomed = folder.with_name(f"{folder.name}.old{TEMPORARY}")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(folder.rename(doomed))
