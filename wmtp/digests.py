"""A folder that carries the digests of its files, by which damage is found and named.

The record of them is sealed by a digest of its own: what it no longer lists is missed, too.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from wmtp.files import digest_of, read_json, write_text

DIGESTS = "digests.json"


class DamageError(ValueError):
    """A folder is not as it was written; says what is wrong."""


def write_digests(folder: Path, **about: Any) -> None:
    """Of what is in it, into it, with what else is to be known about it."""
    record = {"files": digests(folder), **about}
    sealed = {**record, "seal": _seal(record)}
    write_text(folder / DIGESTS, json.dumps(sealed, indent=1) + "\n")


def read_digests(folder: Path) -> dict[str, Any]:
    """The record that `write_digests` wrote.

    Raises:
        DamageError: it is not there, or not as it was.
    """
    try:
        record = read_json(folder / DIGESTS)
    except FileNotFoundError as error:
        raise DamageError(f"it has no {DIGESTS}") from error
    except (OSError, ValueError) as error:
        raise DamageError(f"{DIGESTS} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise DamageError(f"{DIGESTS} is no object")
    if record.pop("seal", None) != _seal(record):
        raise DamageError(f"{DIGESTS} has changed since it was written")
    return record


def what_is_wrong(folder: Path) -> str | None:
    """With a finished checkpoint or model; None: it is whole."""
    try:
        wanted = read_digests(folder)["files"]
        found = digests(folder)
    except DamageError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error}"
    for name, digest in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} has changed since it was written"
    return None


def digests(folder: Path) -> dict[str, str]:
    """Of each file in it, by its name relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    return {file.relative_to(folder).as_posix(): digest_of(file) for file in files}


def _seal(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
