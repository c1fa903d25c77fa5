"""Which text there is, and which of it is kept for validation.

A corpus is a list of files, known by what they hold: one that is moved, renamed or touched is the
same file. Files are split whole, so that no validation text is a neighbour of training text. All
text must be UTF-8: a file that is not is an error that names it, because replacement characters
would silently become part of what the model learns.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wmtp.files import digest_of, shown

TEXT_SUFFIXES = frozenset(
    {".txt", ".jsonl", ".md", ".rst", ".tex", ".html", ".py", ".pyi", ".js", ".ts", ".java"}
    | {".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go"}
)
# Tests are half of the standard library and read like nothing else in it.
SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"]
)
VALIDATION_SHARE = 0.05
BYTE_ORDER_MARK = "\ufeff"
LARGEST_REWARD = 3.4e38  # of float32


class DataError(ValueError):
    """The user's text, or the request about it, cannot be used; says what to change."""


class Document(NamedTuple):
    """One text. `place` is where it stands; `reward` what a `.jsonl` line says about it."""

    text: str
    place: str
    reward: float | None = None


class TextFile(NamedTuple):
    """A file of a corpus; its name is relative to the corpus's folder."""

    path: Path
    name: str
    digest: str

    @property
    def has_lines(self) -> bool:
        """Whether each line is a document."""
        return self.path.suffix.lower() == ".jsonl"


class Corpus(NamedTuple):
    """Files under one folder.

    Attributes:
        root: the folder that names are relative to.
        files: by name.
        skipped: what could not be read, each with the reason.
    """

    root: Path
    files: tuple[TextFile, ...]
    skipped: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return shown(self.files[0].path if len(self.files) == 1 else self.root)

    def digests(self) -> dict[str, str]:
        """Of each file and how it is read, by its name."""
        return {file.name: file.digest + " by line" * file.has_lines for file in self.files}

    def fingerprint(self) -> str:
        """Changes when a file is added or removed, or its content changes."""
        return hashlib.sha256("\n".join(sorted(self.digests().values())).encode()).hexdigest()

    def split(self) -> tuple[Iterator[Document], Iterator[Document]]:
        """Training documents and validation documents.

        Which files validate is decided by their content: one in twenty, at least one, and files
        that are equal stay together. A single file is split inside: the lines of a `.jsonl`, or
        else the text's last twentieth.
        """
        if len(self.files) == 1:
            return _split_single(self.files[0])
        ordered = sorted(self.files, key=lambda file: (file.digest, file.has_lines))
        count = max(1, round(VALIDATION_SHARE * len(ordered)))
        while count < len(ordered) - 1 and ordered[count].digest == ordered[count - 1].digest:
            count += 1
        return _documents_of(ordered[count:]), _documents_of(ordered[:count])


def find_corpus(path: Path | None = None, *, skip_unreadable: bool = False) -> Corpus:
    """The text at `path`: a file, or all text files under a folder; None: the standard library.

    Linked files and folders are followed, each folder once.

    Raises:
        DataError: nothing is there, or no text file, or a part that cannot be read and is not to be
            skipped.
    """
    if path is None:
        path, suffixes = Path(sysconfig.get_path("stdlib")), frozenset({".py"})
    else:
        path, suffixes = _resolved(path), TEXT_SUFFIXES
    unreadable: list[str] = []
    if path.is_file():
        root, found = path.parent, [path]
    elif path.is_dir():
        root, found = path, _text_files(path, suffixes, unreadable)
    else:
        raise DataError(f"no file or folder {shown(path)}: pass a text file or a folder of them")
    files = []
    for file in found:
        try:
            files.append(TextFile(file, file.relative_to(root).as_posix(), digest_of(file)))
        except OSError as error:
            unreadable.append(_unreadable(error))
    if unreadable and not skip_unreadable:
        more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
        raise DataError(
            f"cannot read {', '.join(unreadable[:3])}{more}: make it readable, or leave it out "
            f"with --skip-unreadable"
        )
    if not files:
        looked = " ".join(sorted(suffixes))
        raise DataError(f"no text file under {shown(path)}: looked for {looked}")
    return Corpus(root, tuple(files), tuple(unreadable))


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError before 3.13
        raise DataError(f"cannot read {shown(path)} ({error}): pass a file or a folder") from error


def read_documents(file: TextFile) -> Iterator[Document]:
    """The lines of a `.jsonl` file, or the whole of any other file as one document.

    Raises:
        DataError: not UTF-8, or a line that is no object with a `text`; names file and place.
    """
    name = shown(file.path)
    try:
        content = file.path.read_bytes().decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 at byte {error.start}: convert it, or move it out of the data"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {_unreadable(error)}: make it readable") from error
    if not file.has_lines:
        yield Document(content, name)
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield _parse_line(line, f"{name}:{number}")


def _parse_line(line: str, place: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({error}): one object a line is wanted") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f'{place} has no "text": each line must be {{"text": "...", ...}}')
    text, reward = record["text"], record.get("reward")
    if not _is_unicode(text):
        raise DataError(
            f'{place}: "text" has a lone surrogate, half of a character (\\ud800 to \\udfff): '
            "write the whole character, or take the line out"
        )
    return Document(text, place, None if reward is None else _reward(reward, place))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _reward(value: Any, place: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and abs(value) <= LARGEST_REWARD:
        return float(value)
    raise DataError(f'{place}: "reward" must be a finite number of float32, got {value!r:.40}')


def _text_files(root: Path, suffixes: frozenset[str], unreadable: list[str]) -> list[Path]:
    """Those under `root`, by name; folders that cannot be read are added to `unreadable`."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(
        root, followlinks=True, onerror=lambda error: unreadable.append(_unreadable(error))
    ):
        status = os.stat(folder)
        place = status.st_dev, status.st_ino
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS) if place not in seen else []
        if place in seen:
            continue
        seen.add(place)
        found += [Path(folder, name) for name in names if Path(name).suffix.lower() in suffixes]
    return sorted(found)


def _unreadable(error: OSError) -> str:
    return f"{shown(error.filename)} ({error.strerror})"


def _documents_of(files: list[TextFile]) -> Iterator[Document]:
    for file in files:
        yield from read_documents(file)


def _split_single(file: TextFile) -> tuple[Iterator[Document], Iterator[Document]]:
    documents = list(read_documents(file))
    if len(documents) > 1:
        cut = len(documents) - max(1, round(VALIDATION_SHARE * len(documents)))
        return iter(documents[:cut]), iter(documents[cut:])
    text = "".join(document.text for document in documents)
    cut = int(len(text) * (1 - VALIDATION_SHARE))
    place = shown(file.path)
    return iter([Document(text[:cut], place)]), iter([Document(text[cut:], place)])
