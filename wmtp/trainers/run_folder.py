"""A run on disk, so written that a kill at any moment leaves something to resume from.

    DIR/config.json            what the run is; decides whether --resume fits
    DIR/settings.json          all settings, as the last start had them
    DIR/metrics.jsonl          one object a step
    DIR/checkpoints/step-N     the state after N steps and their records, see checkpoints.py
    DIR/lock                   whose it is, while a process is at it
    DIR/final                  the trained model
    DIR/result.json            written last: the run is finished

Whatever must be whole is written under a name ending in .tmp, synced, and renamed.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wmtp.digests import read_digests, what_is_wrong
from wmtp.files import (
    FREE,
    TEMPORARY,
    digest_of,
    read_json,
    remove,
    rename_folder,
    write_text,
    writing,
)
from wmtp.trainers.checkpoints import Checkpoints
from wmtp.trainers.errors import RunError
from wmtp.trainers.evaluation import what_lacks
from wmtp.trainers.identity import differences, identity_digest
from wmtp.trainers.lock import locked

LOCK = "lock"
METRICS = "metrics.jsonl"
FILES = ("config.json", "settings.json", METRICS, "result.json", "final")
FREE_SPACE = f"{FREE}, then continue with --resume"
ELSEWHERE = "choose another --out"


class RunFolder:
    """The folder of one run; it knows files and nothing of training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._metrics_path = path / METRICS

    @property
    def run(self) -> str:
        """Which one it is; what its checkpoints and its model are known by."""
        return identity_digest(self._read_json("config.json") or {})

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
            RunError: it is damaged.
        """
        file = self.path / "result.json"
        result = self._read_json(file.name)
        if result is not None and (missing := what_lacks(result)):
            raise RunError(
                f"{file} has no {missing}: restore it, or delete it and continue with --resume: "
                "no step is trained again"
            )
        return result

    def write_result(self, result: dict[str, Any], steps: int) -> None:
        """Finish the run, whose metrics become those that its last checkpoint was saved with; the
        result gets their digest."""
        self.cut_metrics_back((steps, self.checkpoints.named(steps)))
        result["metrics"] = digest_of(self._metrics_path)
        with writing(self.path / "result.json", FREE_SPACE):
            write_text(self.path / "result.json", json.dumps(result, indent=2) + "\n")

    def check_final(self) -> None:
        """That the trained model is the run's own.

        Raises:
            RunError: it is another's, or damaged.
        """
        final = self.path / "final"
        wrong = what_is_wrong(final)
        if wrong is None and read_digests(final).get("run") != self.run:
            wrong = "it is of another run"
        if wrong is not None:
            raise RunError(
                f"{final} is not as it was written ({wrong}): restore it, or delete "
                f"{self.path / 'result.json'} to have it written again"
            )

    def restore_metrics(self) -> str | None:
        """Make a finished run's metrics those that it ended with, from a checkpoint that has them.

        Returns:
            What was wrong with them, and what has them.

        Raises:
            RunError: there is no such checkpoint.
        """
        digest = (self.result() or {}).get("metrics")
        if self._metrics_path.is_file() and digest_of(self._metrics_path) == digest:
            return None
        wrong = f"{self._metrics_path} is not as the run ended with it"
        for copy in self.checkpoints.path.glob(f"step-*/{METRICS}"):
            if digest_of(copy) == digest:
                with writing(self._metrics_path, FREE_SPACE):
                    write_text(self._metrics_path, copy.read_text(encoding="utf-8"))
                return f"{wrong}: restored from {copy.parent}"
        raise RunError(
            f"{wrong}: restore it, or delete {self.path / 'result.json'} and continue with "
            "--resume: from the last checkpoint, or from the start without one"
        )

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
        return _records(self._metrics_path)

    def newest_whole(self) -> tuple[tuple[int, Path] | None, list[str]]:
        """The checkpoint to go on from; see `Checkpoints.newest_whole`."""
        return self.checkpoints.newest_whole(self.run)

    def commit_checkpoint(self, step: int) -> None:
        """Finish the one in progress: with the records of its steps, and as this run's.

        Raises:
            RunError: a record was lost since it was written.
        """
        records = [record for record in self.read_metrics() if record["step"] <= step]
        lost = set(range(1, step + 1)).difference(record["step"] for record in records)
        if lost:
            raise RunError(
                f"{self._metrics_path} has lost {len(lost)} of {step} records while they were "
                f"written, the first of step {min(lost)}: go on from the last checkpoint with "
                "--resume"
            )
        write_text(self.checkpoints.in_progress(step) / METRICS, _lines(records))
        self.checkpoints.commit(step, self.run)

    def cut_metrics_back(self, checkpoint: tuple[int, Path] | None) -> str | None:
        """Make the metrics those that a checkpoint was saved with, none without one: the resumed
        run writes those of later steps again.

        Returns:
            What was wrong with them.
        """
        step, place = checkpoint or (0, None)
        found = {record["step"]: record for record in self.read_metrics()}
        saved = [] if place is None else _records(place / METRICS)
        wrong = [record["step"] for record in saved if found.get(record["step"]) != record]
        with writing(self._metrics_path, FREE_SPACE):
            write_text(self._metrics_path, _lines(saved))
        if not wrong:
            return None
        return (
            f"{self._metrics_path} has lost or changed {len(wrong)} of {step} records, the first "
            f"of step {wrong[0]}"
        )

    def write_folder(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill a folder that appears as DIR/name when it is whole."""
        temporary, final = self.path / (name + TEMPORARY), self.path / name
        for stale in (temporary, final):
            remove(stale)
        with writing(temporary, FREE_SPACE):
            temporary.mkdir()
            write(temporary)
            rename_folder(temporary, final)

    def remove_leftovers(self) -> None:
        """Delete what a killed run did not finish writing, under our own names alone."""
        own = (self.path / (name + TEMPORARY) for name in FILES)
        for leftover in (*own, *self.checkpoints.leftovers()):
            remove(leftover)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        if not os.path.lexists(file):
            return None
        try:
            content = read_json(file)
        except (OSError, ValueError) as error:
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
        own = {"config.json", "settings.json", METRICS, "checkpoints", "reference"}
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


def _records(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    records = [record for line in lines[:-1] if (record := _record(line))]
    return sorted({record["step"]: record for record in records}.values(), key=_step)


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _step(record: dict[str, Any]) -> int:
    return record["step"]


def _record(line: str) -> dict[str, Any] | None:
    """What a line of the metrics holds; None where it is damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def _as_json(value: dict[str, Any]) -> Any:
    return json.loads(json.dumps(value))
