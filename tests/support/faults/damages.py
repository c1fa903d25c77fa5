"""What may happen to the files of a run while no process is at it."""

import json
import os
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from wmtp.digests import DIGESTS, what_is_wrong
from wmtp.trainers import RunFolder


@dataclass
class Damage:
    """Done, with what undoes it.

    Attributes:
        said: what it is.
        refusable: whether the run may refuse to go on, with the name of one of `before`.
        before: the content of each file that was damaged; None: there was none.
    """

    said: str
    refusable: bool = False
    before: dict[Path, bytes | None] = field(default_factory=dict)

    def named_in(self, message: str) -> bool:
        """Whether it says which file it is: by its path, or by its folder's and its name. Damaged
        digests speak of another file."""
        return any(
            str(file) in message
            or (str(file.parent) in message and (file.name in message or file.name == DIGESTS))
            for file in self.before
        )

    def undo(self) -> Path:
        """Of the first file alone."""
        file, content = next(iter(self.before.items()))
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        return file


def damage(random: Random, out: Path) -> Damage | None:
    """The first kind, of all in a random order, that finds what it damages; None: there is none."""
    tried = (kind(random, out) for kind in random.sample(KINDS, len(KINDS)))
    return next(filter(None, tried), None)


def _in_a_checkpoint(random: Random, out: Path) -> Damage | None:
    steps = _whole(out)
    if not steps:
        return None
    done = Damage("", refusable=len(steps) == 1)
    done.said = _spoil(random, steps[-1], done.before)
    return done


def _in_every_checkpoint(random: Random, out: Path) -> Damage | None:
    steps = _whole(out)
    if not steps:
        return None
    done = Damage("", refusable=True)
    done.said = ", ".join(_spoil(random, step, done.before) for step in reversed(steps))
    return done


def _in_the_reference(random: Random, out: Path) -> Damage | None:
    """The finished model that the excess is taken over."""
    final = out / "reference" / "final"
    if not final.is_dir():
        return None
    done = Damage("", refusable=True)
    done.said = _spoil(random, final, done.before)
    return done


def _spoil(random: Random, checkpoint: Path, before: dict[Path, bytes | None]) -> str:
    file = random.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    before[file] = content = file.read_bytes()
    name = f"{checkpoint.name}/{file.name}"
    kind = random.choice(("cut", "flipped", "deleted"))
    if kind == "deleted":
        file.unlink()
        return f"{name} deleted"
    at = random.choice((0, random.randrange(len(content))))
    if kind == "cut":
        file.write_bytes(content[:at])
        return f"{name} cut to {at} bytes"
    bit = random.randrange(8)
    flipped = content[at] ^ (1 << bit)
    file.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
    return f"bit {bit} of byte {at} of {name} flipped"


def _after_the_metrics(random: Random, out: Path) -> Damage | None:
    file = _place(out) / "metrics.jsonl"
    if not file.exists() or not (content := file.read_bytes()):
        return None
    last = content.splitlines(keepends=True)[-1]
    tail = random.choice((b"\0" * 64, b"garbage\n", b"\xff\xfe\n", b'{"no": "step"}\n', last))
    file.write_bytes(content + tail)
    return Damage(f"{tail[:9]!r}... added to the metrics")


def _of_the_metrics(random: Random, out: Path) -> Damage | None:
    """In the last line, or anywhere: each checkpoint has its own."""
    file = _place(out) / "metrics.jsonl"
    if not file.exists() or not (content := file.read_bytes()):
        return None
    last = content.splitlines(keepends=True)[-1]
    lost = random.randint(1, len(random.choice((last, content))))
    file.write_bytes(content[:-lost])
    return Damage(f"{lost} bytes less of metrics")


def _of_a_record(random: Random, out: Path) -> Damage | None:
    places = (out, out / "reference")
    names = ("config.json", "result.json")
    files = [file for at in places for name in names if (file := at / name).exists()]
    if not files:
        return None
    file = random.choice(files)
    content = file.read_bytes()
    at = random.randrange(len(content))
    file.write_bytes(random.choice((content[:at], content[:at] + b"\0" * (len(content) - at))))
    said = f"{file.relative_to(out)} damaged from byte {at}"
    return Damage(said, refusable=True, before={file: content})


def _a_copy_that_stays(random: Random, out: Path) -> Damage | None:
    steps = _whole(out)
    if not steps:
        return None
    copied = random.choice(steps)
    kept = copied.with_name(f"{copied.name}-keep")
    shutil.copytree(copied, kept, dirs_exist_ok=True)
    return Damage(f"{kept.name} copied")


def _a_copy_under_another_step(random: Random, out: Path) -> Damage | None:
    steps = _whole(out)
    if not steps:
        return None
    copied = random.choice(steps)
    shutil.copytree(copied, copied.with_name("step-98"), dirs_exist_ok=True)
    return Damage(f"{copied.name} copied as step-98")


def _an_empty_checkpoint(random: Random, out: Path) -> Damage | None:
    place = _place(out)
    if not (place / "config.json").exists():
        return None
    (place / "checkpoints" / "step-99").mkdir(parents=True, exist_ok=True)
    return Damage("an empty step-99")


def _a_lock(random: Random, out: Path) -> Damage | None:
    """Nobody's; that of another host is for the user to delete."""
    if not out.exists():
        return None
    file = _place(out) / "lock"
    host = random.choice((socket.gethostname(), "elsewhere", ""))
    file.write_text(json.dumps({"host": host, "pid": 1}) if host else "")
    elsewhere = host == "elsewhere"
    return Damage(f"a lock of {host!r}", elsewhere, {file: None} if elsewhere else {})


def _leftovers(random: Random, out: Path) -> Damage | None:
    """Of a write that was not finished; a finished run has none."""
    place = _place(out)
    if not place.exists() or (place / "result.json").exists():
        return None
    for name in ("config.json", "metrics.jsonl", "result.json"):
        (place / f"{name}.tmp").write_bytes(os.urandom(random.randrange(64)))
    for name in ("final", "checkpoints/step-2", "checkpoints/step-4.old"):
        leftover = place / f"{name}.tmp"
        if leftover.parent.exists():
            leftover.mkdir(exist_ok=True)
            (leftover / "model.safetensors").write_bytes(b"half")
    return Damage("leftovers *.tmp")


def _place(out: Path) -> Path:
    """The folder that a process was last at: the run's, or its reference's."""
    reference = out / "reference"
    begun = (out / "metrics.jsonl").exists() or not reference.exists()
    return out if begun else reference


def _whole(out: Path) -> list[Path]:
    """The whole checkpoints where a process was last, in order."""
    found = RunFolder(_place(out)).checkpoints
    paths = [found.path / f"step-{step}" for step in found.steps() if step != 98]
    return [path for path in paths if (path / DIGESTS).is_file() and not what_is_wrong(path)]


KINDS = (
    _in_a_checkpoint,
    _in_a_checkpoint,
    _in_a_checkpoint,
    _in_every_checkpoint,
    _in_the_reference,
    _after_the_metrics,
    _of_the_metrics,
    _of_a_record,
    _a_copy_that_stays,
    _a_copy_under_another_step,
    _an_empty_checkpoint,
    _a_lock,
    _leftovers,
)
