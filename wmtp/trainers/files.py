"""Files that are there as a whole or not at all, and the error of a run's folder."""

import os
from pathlib import Path

TEMPORARY = ".tmp"


class RunError(RuntimeError):
    """The run folder and the request do not fit; says what to do."""


def write_text(file: Path, text: str) -> None:
    """Replace `file` by `text`, at once or not at all."""
    temporary = file.with_name(file.name + TEMPORARY)
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync_path(file.parent)


def rename_folder(temporary: Path, final: Path) -> None:
    """Give a folder its name after its content has reached the disk."""
    for path in temporary.rglob("*"):
        sync_path(path)
    sync_path(temporary)
    temporary.rename(final)
    sync_path(final.parent)


def sync_path(path: Path) -> None:
    """Have a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
