"""A run on disk, so written that a kill at any moment leaves something to resume from.

    DIR/config.json            what the run is; decides whether --resume fits
    DIR/metrics.jsonl          one object a step
    DIR/checkpoints/step-N     the state after N steps
    DIR/final                  the trained model
    DIR/result.json            written last: the run is finished

Whatever must be whole is written under a name ending in .tmp, synced, and renamed.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"


class RunError(RuntimeError):
    """The run folder and the request do not fit; says what to do."""


class RunFolder:
    """The folder of one run; it knows files and nothing of training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoints = path / "checkpoints"
        self._metrics_path = path / "metrics.jsonl"

    def open(self, identity: dict[str, Any], *, resume: bool) -> None:
        """Start a run here, or check that the run that is here is this one.

        Raises:
            RunError: the folder is in use and resume is False; or it holds another run, or
                something else.
        """
        there = self._read_json("config.json")
        if there is None or not self._begun():
            self._refuse_foreign_files()
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.json", json.dumps(identity, indent=2) + "\n")
        elif not resume:
            raise RunError(
                f"{self.path} already holds a run: continue it with --resume, "
                "or choose another --out, or delete it"
            )
        elif there != _as_json(identity):
            raise RunError(
                f"{self.path} holds a run with other settings ({_difference(there, identity)}): "
                "repeat its settings, or choose another --out"
            )

    def _begun(self) -> bool:
        """Whether anything was computed: a start that failed leaves only its settings."""
        if self.read_metrics() or self._numbered_checkpoints() or self.result():
            return True
        reference = self.path / "reference"
        return reference.is_dir() and RunFolder(reference)._begun()

    def result_of(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The result, if a run of just this identity is finished here."""
        if self._read_json("config.json") != _as_json(identity):
            return None
        return self.result()

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run."""
        return self._read_json("result.json")

    def write_result(self, result: dict[str, Any]) -> None:
        """Finish the run."""
        write_text(self.path / "result.json", json.dumps(result, indent=2) + "\n")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one step's line."""
        with open(self._metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines; a kill may have cut the last one short."""
        if not self._metrics_path.exists():
            return []
        lines = self._metrics_path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def cut_metrics_back(self, step: int) -> None:
        """Forget the metrics after `step`: the resumed run writes them again.

        Raises:
            RunError: the metrics up to `step` are not all there.
        """
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        if [record["step"] for record in kept] != list(range(1, step + 1)):
            raise RunError(
                f"{self._metrics_path} lacks some of the steps 1 to {step} of the checkpoint: "
                "restore the file, or start anew in another --out"
            )
        write_text(self._metrics_path, "".join(json.dumps(record) + "\n" for record in kept))

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint and the step it was taken after."""
        found = self._numbered_checkpoints()
        return found[-1] if found else None

    def checkpoint_in_progress(self, step: int) -> Path:
        """Where the state after `step` is written before it has its name."""
        return self._checkpoints / f"step-{step}{TEMPORARY}"

    def begin_checkpoint(self, step: int) -> None:
        """Make `checkpoint_in_progress` an empty folder."""
        temporary = self.checkpoint_in_progress(step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def commit_checkpoint(self, step: int, keep_last: int) -> None:
        """Give `checkpoint_in_progress` its name; drop all but the last `keep_last`."""
        _sync_path(self._metrics_path)
        rename_folder(self.checkpoint_in_progress(step), self._checkpoints / f"step-{step}")
        for _, old in self._numbered_checkpoints()[:-keep_last]:
            # Renamed first: a kill inside rmtree must not leave half a checkpoint under its name.
            shutil.rmtree(old.rename(old.with_name(old.name + TEMPORARY)))

    def write_folder(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill a folder that appears as DIR/name when it is whole."""
        temporary, final = self.path / (name + TEMPORARY), self.path / name
        for stale in (temporary, final):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        rename_folder(temporary, final)

    def remove_leftovers(self) -> None:
        """Delete what a killed run did not finish writing."""
        for leftover in (
            *self.path.glob("*" + TEMPORARY),
            *self._checkpoints.glob("*" + TEMPORARY),
        ):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _numbered_checkpoints(self) -> list[tuple[int, Path]]:
        found = [
            (int(path.name.removeprefix("step-")), path)
            for path in self._checkpoints.glob("step-*")
            if not path.name.endswith(TEMPORARY)
        ]
        return sorted(found)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        if not file.is_file():
            return None
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content

    def _refuse_foreign_files(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file: choose another --out")
        # A kill before config.json had its name leaves only the temporary file.
        own = {"config.json", "metrics.jsonl", "checkpoints", "reference"}
        if self._read_json("config.json") is None:
            own = set()
        found = {path.name for path in self.path.glob("*") if path.suffix != TEMPORARY}
        foreign = sorted(found - own)
        if foreign:
            raise RunError(
                f"{self.path} is not empty and holds no run (found {foreign[0]}): "
                "choose another --out"
            )


def write_text(file: Path, text: str) -> None:
    """Replace `file` by `text`, at once or not at all."""
    temporary = file.with_name(file.name + TEMPORARY)
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    _sync_path(file.parent)


def rename_folder(temporary: Path, final: Path) -> None:
    """Give a folder its name after its content has reached the disk."""
    for path in temporary.rglob("*"):
        _sync_path(path)
    _sync_path(temporary)
    temporary.rename(final)
    _sync_path(final.parent)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_json(value: dict[str, Any]) -> Any:
    return json.loads(json.dumps(value))


def _difference(there: dict[str, Any], asked: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}: {there.get(name)} there, {asked.get(name)} asked"
        for name in sorted(there.keys() | asked.keys())
        if there.get(name) != asked.get(name)
    )
