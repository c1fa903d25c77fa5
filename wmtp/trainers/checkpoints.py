"""The checkpoints of a run: folders step-N, each with the digests of its files.

A checkpoint is whole when the digests are there and all files answer to them. Only whole ones of
the run are resumed from, and only our own names are ever touched: a copy that somebody keeps stays.
"""

import math
import os
import re
from pathlib import Path

from wmtp.digests import DIGESTS, read_digests, what_is_wrong, write_digests
from wmtp.files import TEMPORARY, discard, remove, rename_folder
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

    def newest_whole(self, run: str = "") -> tuple[tuple[int, Path] | None, list[str]]:
        """The newest whole one and the step it was taken after, and what is wrong with newer ones.

        Args:
            run: the digest of its identity; a checkpoint of another one is passed over.

        Raises:
            RunError: there are some, and none is whole.
        """
        complaints: list[str] = []
        for step in reversed(self.steps()):
            wrong = _what_is_wrong(self.named(step), step, run)
            if wrong is None:
                return (step, self.named(step)), complaints
            complaints.append(wrong)
        if complaints:
            raise RunError(
                f"no whole checkpoint: {'; '.join(complaints)}: restore one, or delete "
                f"{self.path} to start anew"
            )
        return None, complaints

    def in_progress(self, step: int) -> Path:
        """Where the state after `step` is written before it has its name."""
        return self.path / f"step-{step}{TEMPORARY}"

    def leftovers(self) -> list[Path]:
        """What was begun, or was being removed, when a process was killed."""
        ours = re.compile(rf"step-\d+(\.old)?{re.escape(TEMPORARY)}")
        return [path for path in self.path.glob("step-*") if ours.fullmatch(path.name)]

    def begin(self, step: int) -> None:
        """Make `in_progress` an empty folder."""
        temporary = self.in_progress(step)
        remove(temporary)
        temporary.mkdir(parents=True)

    def commit(self, step: int, run: str = "") -> None:
        """Write the digests of `in_progress`, whose it is, and give it its name, in place of what
        has it."""
        temporary, final = self.in_progress(step), self.named(step)
        write_digests(temporary, run=run, step=step)
        if os.path.lexists(final):
            discard(final)
        rename_folder(temporary, final)

    def drop_old(self, keep_last: int, upto: float = math.inf) -> None:
        """All but the last `keep_last` that are finished, of those up to a step: a later one is
        none that the run has gone on from, and must not outlast those."""
        finished = [
            step for step in self.steps() if step <= upto and (self.named(step) / DIGESTS).is_file()
        ]
        for step in finished[:-keep_last]:
            discard(self.named(step))

    def named(self, step: int) -> Path:
        """Where the one after `step` is."""
        return self.path / f"step-{step}"


def _what_is_wrong(path: Path, step: int, run: str) -> str | None:
    if wrong := what_is_wrong(path):
        return f"{path} is damaged ({wrong})"
    about = read_digests(path)
    if about.get("run") != run:
        return f"{path} is of another run"
    if about.get("step") != step:
        return f"{path} holds the state after step {about.get('step')}"
    return None
