"""A folder that carries the digests of its files, by which damage is found and named."""

import json
from pathlib import Path

from wmtp.files import digest_of, write_text

DIGESTS = "digests.json"


def write_digests(folder: Path) -> None:
    """Of what is in it, into it."""
    write_text(folder / DIGESTS, json.dumps(digests(folder), indent=1) + "\n")


def what_is_wrong(folder: Path) -> str | None:
    """With a finished checkpoint or model; None: it is whole."""
    if not (folder / DIGESTS).is_file():  # a pipe would be waited for
        return f"it has no {DIGESTS}"
    try:
        wanted = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        found = digests(folder)
    except (OSError, ValueError) as error:
        return f"{DIGESTS} cannot be read: {error}"
    if not isinstance(wanted, dict):
        return f"{DIGESTS} is no object"
    for name, digest in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} has changed since it was written"
    for name in found.keys() - wanted.keys():
        return f"{name} is not among its {DIGESTS}"
    return None


def digests(folder: Path) -> dict[str, str]:
    """Of each file in it, by its name relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    return {file.relative_to(folder).as_posix(): digest_of(file) for file in files}
