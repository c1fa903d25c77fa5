"""A run on disk, so written that a kill at any moment leaves something to resume from.

    DIR/config.json            what the run is; decides whether --resume fits
    DIR/settings.json          all settings, as the last start had them
    DIR/metrics.jsonl          one object a step
    DIR/checkpoints/step-N     the state after N steps, see checkpoints.py
    DIR/lock                   whose it is, while a process is at it
    DIR/final                  the trained model
    DIR/result.json            written last: the run is finished

Whatever must be whole is written under a name ending in .tmp, synced, and renamed.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wmtp.digests import what_is_wrong
from wmtp.files import TEMPORARY, digest_of, rename_folder, sync_path, write_text, writing
from wmtp.trainers.checkpoints import Checkpoints
from wmtp.trainers.errors import RunError
from wmtp.trainers.identity import differences
from wmtp.trainers.lock import locked

LOCK = "lock"
FILES = ("config.json", "settings.json", "metrics.jsonl", "result.json", "final")
FREE_SPACE = "free some space, then continue with --resume"
ELSEWHERE = "choose another --out"
RECORDED = {"step": int, "stage": str, "loss": float, "tokens_per_s": float}  # of every step
ENDS = {"start", "end"}  # the evaluations in a result


class RunFolder:
    """The folder of one run; it knows files and nothing of training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", self._digest)
        self._metrics_path = path / "metrics.jsonl"

    def _digest(self) -> str:
        """Of what the run is; no two runs have the same."""
        return digest_of(self.path / "config.json")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else may start here while the block runs.

        Raises:
            RunError: somebody has, or the folder holds something else.
        """
        with writing(self.path, ELSEWHERE):
            if not (self.path / "config.json").is_file():
                self._refuse_foreign_files()
            self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / LOCK):
            yield

    def open(self, identity: dict[str, Any], *, resume: bool) -> None:
        """Start a run here, or check that the run that is here is this one.

        Raises:
            RunError: the folder is in use and resume is False; or it holds another run, or
                something else.
        """
        there = self._read_json("config.json")
        if there is None or not self._begun():
            self._refuse_foreign_files()
            with writing(self.path / "config.json", ELSEWHERE):
                self.path.mkdir(parents=True, exist_ok=True)
                write_text(self.path / "config.json", json.dumps(identity, indent=2) + "\n")
        elif not resume:
            raise RunError(
                f"{self.path} already holds a run: continue it with --resume, "
                "or choose another --out, or delete it"
            )
        elif found := differences(there, _as_json(identity)):
            raise RunError(
                f"{self.path} holds a run with other settings or data ({found}): "
                "repeat them, or choose another --out"
            )

    def write_settings(self, settings: dict[str, Any]) -> None:
        """For the reader; nothing is decided by them."""
        with writing(self.path / "settings.json", FREE_SPACE):
            write_text(self.path / "settings.json", json.dumps(settings, indent=2) + "\n")

    def _begun(self) -> bool:
        """Whether anything was computed: a start that failed leaves only its settings."""
        if self.read_metrics() or self.checkpoints.steps() or self.result():
            return True
        reference = self.path / "reference"
        return reference.is_dir() and RunFolder(reference)._begun()

    def result_of(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The result, if a run of just this identity is finished here."""
        there = self._read_json("config.json")
        if there is None or differences(there, _as_json(identity)):
            return None
        return self.result()

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run.

        Raises:
            RunError: it lacks an evaluation, or the trained model is damaged.
        """
        result = self._read_json("result.json")
        final = self.path / "final"
        if result is not None and final.exists() and (wrong := what_is_wrong(final)):
            raise RunError(
                f"{final} is damaged ({wrong}): restore it, or delete "
                f"{self.path / 'result.json'}, and --resume makes it again"
            )
        if result is not None and not result.keys() >= ENDS:
            raise RunError(
                f"{self.path / 'result.json'} is damaged (it lacks {' and '.join(sorted(ENDS))}): "
                "delete it, and the run goes on from its last checkpoint"
            )
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Finish the run."""
        with writing(self.path / "result.json", FREE_SPACE):
            write_text(self.path / "result.json", json.dumps(result, indent=2) + "\n")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one step's line."""
        with (
            writing(self._metrics_path, FREE_SPACE),
            open(self._metrics_path, "a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """A record a step, in order. A kill may have cut the last line short, and what is no
        record, or a step's that was written again, is passed over: `cut_metrics_back` counts."""
        if not self._metrics_path.exists():
            return []
        if not self._metrics_path.is_file():
            raise RunError(f"{self._metrics_path} is no file: move it away")
        lines = self._metrics_path.read_text(encoding="utf-8", errors="replace").split("\n")
        records = [record for line in lines[:-1] if (record := _record(line))]
        return sorted({record["step"]: record for record in records}.values(), key=_step)

    def newest_whole(self) -> tuple[tuple[int, Path] | None, list[str]]:
        """The checkpoint to go on from; see `Checkpoints.newest_whole`."""
        there = {record["step"] for record in self.read_metrics()}
        recorded = next(step for step in itertools.count() if step + 1 not in there)
        return self.checkpoints.newest_whole(recorded)

    def cut_metrics_back(self, step: int) -> None:
        """Forget the metrics after `step`: the resumed run writes them again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        with writing(self._metrics_path, FREE_SPACE):
            write_text(self._metrics_path, "".join(json.dumps(record) + "\n" for record in kept))

    def sync_metrics(self) -> None:
        """Have them reach the disk."""
        sync_path(self._metrics_path)

    def write_folder(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill a folder that appears as DIR/name when it is whole."""
        temporary, final = self.path / (name + TEMPORARY), self.path / name
        for stale in (temporary, final):
            shutil.rmtree(stale, ignore_errors=True)
        with writing(temporary, FREE_SPACE):
            temporary.mkdir()
            write(temporary)
            rename_folder(temporary, final)

    def remove_leftovers(self) -> None:
        """Delete what a killed run did not finish writing, under our own names alone."""
        own = (self.path / (name + TEMPORARY) for name in FILES)
        for leftover in (*own, *self.checkpoints.leftovers()):
            if os.path.lexists(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _read_json(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(
                f"{file} cannot be read ({error}): restore it, or choose another --out"
            ) from error
        if not isinstance(content, dict):
            raise RunError(f"{file} is no JSON object: restore it, or choose another --out")
        return content

    def _refuse_foreign_files(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file: choose another --out")
        # A kill before config.json had its name leaves only the temporary file.
        own = {"config.json", "settings.json", "metrics.jsonl", "checkpoints", "reference"}
        if self._read_json("config.json") is None:
            own = set()
        own.add(LOCK)
        found = {path.name for path in self.path.glob("*") if path.suffix != TEMPORARY}
        foreign = sorted(found - own)
        if foreign:
            raise RunError(
                f"{self.path} is not empty and holds no run (found {foreign[0]}): "
                "choose another --out"
            )


def _step(record: dict[str, Any]) -> int:
    return record["step"]


def _record(line: str) -> dict[str, Any] | None:
    """What a line of the metrics holds; None where it is damaged."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(found, dict) and all(
        isinstance(found.get(name), kind) for name, kind in RECORDED.items()
    )
    return found if whole else None


def _as_json(value: dict[str, Any]) -> Any:
    return json.loads(json.dumps(value))
