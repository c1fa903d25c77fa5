"""Which text there is, and which of it is kept for validation.

A corpus is a list of files. Files are split whole, so that no validation text is a neighbour of
training text. All text must be UTF-8: a file that is not is an error that names it, because
replacement characters would silently become part of what the model learns.
"""

import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TEXT_SUFFIXES = frozenset(
    {".txt", ".jsonl", ".md", ".rst", ".tex", ".html", ".py", ".pyi", ".js", ".ts", ".java"}
    | {".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go"}
)
# Tests are half of the standard library and read like nothing else in it.
SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"]
)
VALIDATION_SHARE = 0.05


class DataError(ValueError):
    """The user's text, or the request about it, cannot be used; says what to change."""


class Document(NamedTuple):
    """One text. `reward` is what a `.jsonl` line says about it, if it does."""

    text: str
    reward: float | None = None


class Corpus(NamedTuple):
    """Files under one folder.

    Attributes:
        root: the folder that names are relative to.
        files: sorted.
    """

    root: Path
    files: tuple[Path, ...]

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, resized or written to."""
        digest = hashlib.sha256(f"{self.root}\n".encode())
        for file in self.files:
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def split(self) -> tuple[Iterator[Document], Iterator[Document]]:
        """Training documents and validation documents.

        Which files validate is decided by the hash of their names relative to the root: one in
        twenty, at least one. A single file is split inside: the lines of a `.jsonl`, or else the
        text's last twentieth.
        """
        if len(self.files) == 1:
            return _split_single(self.files[0])

        def name_hash(file: Path) -> bytes:
            return hashlib.sha256(file.relative_to(self.root).as_posix().encode()).digest()

        ordered = sorted(self.files, key=name_hash)
        count = max(1, round(VALIDATION_SHARE * len(ordered)))
        validation = sorted(ordered[:count])
        return _documents_of(sorted(ordered[count:])), _documents_of(validation)


def find_corpus(path: Path | None = None) -> Corpus:
    """The text at `path`: a file, or all text files under a folder; None: the standard library.

    Raises:
        DataError: nothing is there, or no text file.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _text_files(root) if file.suffix == ".py"]
        if not files:
            raise DataError(f"no Python sources under {root}: pass text of your own with --data")
        return Corpus(root, tuple(files))
    path = path.resolve()
    if path.is_file():
        return Corpus(path.parent, (path,))
    if not path.is_dir():
        raise DataError(f"no file or folder {path}: pass a text file or a folder of text files")
    files = _text_files(path)
    if not files:
        raise DataError(f"no text file under {path}: looked for {' '.join(sorted(TEXT_SUFFIXES))}")
    return Corpus(path, tuple(files))


def read_documents(file: Path) -> Iterator[Document]:
    """The lines of a `.jsonl` file, or the whole of any other file as one document.

    Raises:
        DataError: not UTF-8, or a line that is no object with a `text`; names file and place.
    """
    try:
        content = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 at byte {error.start}: convert it, or move it out of the data"
        ) from error
    if file.suffix != ".jsonl":
        yield Document(content)
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield _parse_line(line, f"{file}:{number}")


def _parse_line(line: str, place: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON ({error}): one object a line is wanted") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f'{place} has no "text": each line must be {{"text": "...", ...}}')
    reward = record.get("reward")
    if reward is None:
        return Document(record["text"])
    if isinstance(reward, bool) or not (isinstance(reward, int | float) and math.isfinite(reward)):
        raise DataError(f'{place}: "reward" must be a finite number, got {reward!r}')
    return Document(record["text"], float(reward))


def _text_files(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if Path(name).suffix in TEXT_SUFFIXES]
    return sorted(file for file in found if file.is_file())


def _documents_of(files: list[Path]) -> Iterator[Document]:
    for file in files:
        yield from read_documents(file)


def _split_single(file: Path) -> tuple[Iterator[Document], Iterator[Document]]:
    documents = list(read_documents(file))
    if len(documents) > 1:
        cut = len(documents) - max(1, round(VALIDATION_SHARE * len(documents)))
        return iter(documents[:cut]), iter(documents[cut:])
    text = "".join(document.text for document in documents)
    cut = int(len(text) * (1 - VALIDATION_SHARE))
    return iter([Document(text[:cut])]), iter([Document(text[cut:])])
