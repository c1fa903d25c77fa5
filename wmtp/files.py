"""Files that are there as a whole or not at all, what they hold, and why one cannot be written."""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"
FREE = "free some space"
# What to do instead of `FREE`, where it is something else that stands in the way.
_REMEDIES = {
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EROFS: "make it writable",
    errno.EISDIR: "move it away",
    errno.ENOTDIR: "move away what is there",
    errno.EEXIST: "move away what is there",
}


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
        raise FileError(_cannot_write(path, error, size, remedy)) from error
    except Exception as error:
        if not _is_of_a_writer(error):
            raise
        reason = _reason(error, path, size)
        raise FileError(_cannot_write(path, reason, size, remedy)) from error


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


def _reason(error: Exception, path: Path, size: int | None) -> OSError:
    """The system's, which safetensors tells by its number and torch not at all."""
    said = re.search(r"code: (\d+)|os error (\d+)", str(error))
    if said:
        return _os_error(int(said[1] or said[2]))
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and any(each.stat().st_size >= limit for each in files):
        return _os_error(errno.EFBIG)
    free = _free_bytes(path)
    if free is not None and free < (size or 1):
        return _os_error(errno.ENOSPC)
    return OSError(re.sub(r"\[enforce fail[^]]*\][ .]*", "", str(error).split("\n")[0]))


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _free_bytes(path: Path) -> int | None:
    existing = next((each for each in (path, *path.parents) if each.is_dir()), None)
    with contextlib.suppress(OSError):
        if existing is not None:
            return shutil.disk_usage(existing).free
    return None


def _cannot_write(path: Path, error: OSError, size: int | None, remedy: str) -> str:
    parts = [] if size is None else [f"{size:,} bytes wanted"]
    free = _free_bytes(path)
    parts += [] if free is None else [f"{free:,} bytes free there"]
    bytes_said = f" ({', '.join(parts)})" if parts else ""
    fitting = remedy.replace(FREE, _REMEDIES.get(error.errno or 0, FREE))
    why = error.strerror or str(error)
    return f"cannot write {shown(path)}: {why}{bytes_said}: {fitting}"


def shown(path: Path | str) -> str:
    """A path as text: a name need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def digest_of(file: Path) -> str:
    """SHA-256, in hexadecimal."""
    _check_regular(file)
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: Path) -> Any:
    """What it holds.

    Raises:
        OSError: it is not there, or no regular file.
        ValueError: it is no JSON in UTF-8.
    """
    _check_regular(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _check_regular(file: Path) -> None:
    """A pipe would be waited for."""
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(file))


def write_text(file: Path, text: str) -> None:
    """Replace `file` by `text`, at once or not at all."""
    temporary = file.with_name(file.name + TEMPORARY)
    temporary.unlink(missing_ok=True)  # it may be no regular file
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync_path(file.parent)


def remove(path: Path) -> None:
    """A folder with all that is in it, or a file; or nothing, where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove it at once: a kill inside must not leave half a folder under its name."""
    doomed = path.with_name(f"{path.name}.old{TEMPORARY}")
    remove(doomed)
    remove(path.rename(doomed))


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
