"""Files that are there as a whole or not at all, what they hold, and why one cannot be written."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"


class FileError(RuntimeError):
    """A file cannot be written; names it, and says what to do."""


@contextlib.contextmanager
def writing(path: Path, remedy: str, size: int | None = None) -> Iterator[None]:
    """What goes wrong in the block, where `path` is written, becomes a `FileError`.

    Args:
        path: the file or folder.
        remedy: what the user can do.
        size: the bytes it takes, where they are known.

    Raises:
        FileError: an OSError of the block, or what safetensors and torch.save make of one.
    """
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(_cannot_write(path, error.strerror or str(error), size, remedy)) from error
    except Exception as error:
        if not _is_of_a_writer(error):
            raise
        raise FileError(_cannot_write(path, "it broke off", size, remedy)) from error


def check_writable(file: Path | None, remedy: str) -> None:
    """Before an hour of work is done for it; makes its folder.

    Raises:
        FileError: it is not.
    """
    if file is None:
        return
    with writing(file, remedy):
        file.parent.mkdir(parents=True, exist_ok=True)
        new = not file.exists()
        file.open("ab").close()
        if new:
            file.unlink()


def _is_of_a_writer(error: Exception) -> bool:
    from safetensors import SafetensorError

    words = ("PytorchStreamWriter", "inline_container", "iostream error", "os error")
    return isinstance(error, SafetensorError) or any(word in str(error) for word in words)


def _cannot_write(path: Path, why: str, size: int | None, remedy: str) -> str:
    parts = [] if size is None else [f"{size:,} bytes wanted"]
    existing = next((each for each in (path, *path.parents) if each.is_dir()), None)
    with contextlib.suppress(OSError):
        if existing is not None:
            parts.append(f"{shutil.disk_usage(existing).free:,} bytes free there")
    bytes_said = f" ({', '.join(parts)})" if parts else ""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY:
        remedy = (
            f"no file may have more than {limit:,} bytes here (ulimit -f): raise that, or {remedy}"
        )
    return f"cannot write {shown(path)}: {why}{bytes_said}: {remedy}"


def shown(path: Path | str) -> str:
    """A path as text: a name need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def digest_of(file: Path) -> str:
    """SHA-256, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(file: Path, text: str) -> None:
    """Replace `file` by `text`, at once or not at all."""
    temporary = file.with_name(file.name + TEMPORARY)
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync_path(file.parent)


def json_by_line(value: dict[str, Any]) -> str:
    """An object as JSON: a line for each of its values, and for each entry of its lists.

    >>> print(json_by_line({"command": "bench", "cases": [{"ms": 1}, {"ms": 2}]}))
    {
     "command": "bench",
     "cases": [
      {"ms": 1},
      {"ms": 2}
     ]
    }
    """
    lines = []
    for name, content in value.items():
        text = json.dumps(content)
        if isinstance(content, list) and content:
            entries = ",\n  ".join(map(json.dumps, content))
            text = f"[\n  {entries}\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


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
