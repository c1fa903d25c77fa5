"""One process at a time in a run's folder.

The lock is the kernel's, on a file that names its owner: it ends with the process, however that
ends. Another host's kernel may not know of it, so there the name decides.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from wmtp.files import FREE, writing
from wmtp.trainers.errors import RunError


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock while the block runs.

    Raises:
        RunError: somebody holds it; says who.
    """
    with writing(file, "choose another --out"):
        descriptor = _acquired(file)
    owner = {"host": socket.gethostname(), "pid": os.getpid()}
    try:
        with writing(file, f"{FREE}, or choose another --out"):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: nobody else can be in between
        os.close(descriptor)


def _acquired(file: Path) -> int:
    while True:
        if os.path.lexists(file) and not file.is_file():
            raise RunError(f"{file} is no regular file: delete it, or choose another --out")
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise RunError(_in_use(file, owner)) from error
        if _is(file, descriptor):
            break
        os.close(descriptor)  # its owner has just removed it
    owner = _owner(descriptor)
    if owner and owner.get("host") != socket.gethostname():
        os.close(descriptor)
        raise RunError(f"{_in_use(file, owner)}; if that process is gone, delete {file}")
    return descriptor


def _owner(descriptor: int) -> dict[str, object]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_use(file: Path, owner: dict[str, object]) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return f"{file.parent} is in use by {who}: wait for it, or choose another --out"
