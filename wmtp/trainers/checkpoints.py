"""The checkpoints of a run: folders step-N, each with the digests of its files.

A checkpoint is whole when the digests are there and all files answer to them, and it is this run's
when its progress.json says so. Only such are resumed from, and only our own names are ever touched:
a copy that somebody keeps stays.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wmtp.digests import DIGESTS, what_is_wrong, write_digests
from wmtp.files import TEMPORARY, rename_folder
from wmtp.trainers.errors import RunError

PROGRESS = "progress.json"


class Checkpoints:
    """Those in one folder; `run` tells a run from others."""

    def __init__(self, path: Path, run: Callable[[], str]) -> None:
        self.path = path
        self._run = run

    def steps(self) -> list[int]:
        """Of all that are finished, whole or not, in order; nothing is lost with an empty one."""
        filled = [path.name for path in self.path.glob("step-*") if any(path.glob("*"))]
        found = [re.fullmatch(r"step-(0|[1-9]\d*)", name) for name in filled]
        return sorted(int(match[1]) for match in found if match)

    def newest_whole(self, recorded: int) -> tuple[tuple[int, Path] | None, list[str]]:
        """The newest whole one and the step it was taken after, and what is wrong with newer ones.

        Args:
            recorded: how many steps have their record; one that was taken later is passed over.

        Raises:
            RunError: there are some, and none is whole and recorded.
        """
        complaints: list[str] = []
        ahead = False
        for step in reversed(self.steps()):
            path = self._named(step)
            wrong = what_is_wrong(path) or self._is_of_another(step, path)
            if wrong is not None:
                complaints.append(f"{path} is damaged ({wrong})")
            elif step > recorded:
                ahead = True
                complaints.append(f"{path} is ahead of metrics.jsonl, which lacks {recorded + 1}")
            else:
                return (step, path), complaints
        if ahead:
            raise RunError(
                f"metrics.jsonl lacks step {recorded + 1}, and every whole checkpoint is of a "
                f"later one: restore {self.path.parent / 'metrics.jsonl'}, or delete it and "
                f"{self.path} to start anew"
            )
        if complaints:
            raise RunError(
                f"no whole checkpoint: {'; '.join(complaints)}: restore one, or delete "
                f"{self.path} to start anew"
            )
        return None, complaints

    def _is_of_another(self, step: int, path: Path) -> str | None:
        """Why a whole one is not this run's state after `step`."""
        try:
            progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
            found = progress["run"], progress["step"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"{PROGRESS} says neither run nor step"
        if found[0] != self._run():
            return "it is another run's"
        return None if found[1] == step else f"it is of step {found[1]}"

    def write_progress(self, step: int, state: dict[str, Any]) -> None:
        """Into `in_progress`: whose it is, after which step, and `state`."""
        progress = {"run": self._run(), "step": step, **state}
        (self.in_progress(step) / PROGRESS).write_text(json.dumps(progress))

    def read_progress(self, step: int) -> dict[str, Any]:
        """What `write_progress` has written."""
        progress: dict[str, Any] = json.loads((self._named(step) / PROGRESS).read_text())
        return progress

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
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def commit(self, step: int) -> None:
        """Write the digests of `in_progress` and give it its name, in place of what has it."""
        temporary, final = self.in_progress(step), self._named(step)
        write_digests(temporary)
        if os.path.lexists(final):
            _remove(final)
        rename_folder(temporary, final)

    def drop_old(self, keep_last: int) -> None:
        """All but the last `keep_last` that are finished."""
        finished = [step for step in self.steps() if (self._named(step) / DIGESTS).is_file()]
        for step in finished[:-keep_last]:
            _remove(self._named(step))

    def _named(self, step: int) -> Path:
        return self.path / f"step-{step}"


def _remove(path: Path) -> None:
    # Renamed first: a kill inside rmtree must not leave half a checkpoint under its name.
    doomed = path.with_name(f"{path.name}.old{TEMPORARY}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()
