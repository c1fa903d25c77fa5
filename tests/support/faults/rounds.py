"""A run through several faults to its end, which must be that of an undisturbed run."""

import json
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

from support import tiny_runs
from support.faults.damages import Damage, damage
from support.faults.moments import EXITS, Strike, train

LIMIT = 120  # seconds, of a process
GOING_ON = ": going on from "
RESTORED = "restored from"  # metrics of a part that had ended


@dataclass(frozen=True)
class Ended:
    """A process: its exit code and the lines of its standard error."""

    code: int
    lines: list[str]

    @property
    def errors(self) -> list[str]:
        """The lines but those that a checkpoint was passed over, or metrics restored."""
        return [line for line in self.lines if GOING_ON not in line and RESTORED not in line]


class Runs:
    """The processes of one algorithm, and what an undisturbed one did.

    Attributes:
        moments: (part, what was renamed to or "") of each operation of the undisturbed run.
        sizes: of its files by their part, in bytes; of the metrics a line's.
        seconds: that it took.
    """

    def __init__(self, algo: str, corpus: Path, folder: Path) -> None:
        settings = {"algo": algo, "data": corpus, "vocab_size": tiny_runs.VOCABULARY}
        settings |= tiny_runs.SMALL
        self._arguments = [
            word
            for name, value in settings.items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        self.algo = algo
        self.out = folder / algo
        seen = folder / f"{algo}.json"
        ended = self.process(self.out, seen=seen)
        assert ended.code == 0, ended
        self.seconds, self.moments = json.loads(seen.read_text())
        self.sizes = _sizes(self.out)

    def process(self, out: Path, strike: Strike | None = None, seen: Path | None = None) -> Ended:
        """Run the command to its end."""
        context = tiny_runs.fork_server()
        reader, writer = context.Pipe(duplex=False)
        arguments = (self._arguments, out, writer, strike, seen)
        process = context.Process(target=train, args=arguments)
        process.start()
        writer.close()
        clock = threading.Timer((strike and strike.seconds) or LIMIT, process.kill)
        clock.start()
        with reader, open(reader.fileno(), encoding="utf-8", closefd=False) as errors:
            lines = errors.read().splitlines()
        process.join()
        clock.cancel()
        return Ended(process.exitcode, lines)


def _sizes(out: Path) -> dict[str, list[int]]:
    sizes: dict[str, list[int]] = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        parts = file.relative_to(out).parts
        part = "/".join(parts[: 2 if parts[0] == "reference" else 1])
        lines = file.read_bytes().count(b"\n") if file.name == "metrics.jsonl" else 1
        sizes.setdefault(part, []).append(file.stat().st_size // lines)
    return sizes


class Round:
    """A run, and what happens to it.

    Args:
        seed: of all that is drawn.
        out: the run's folder.
    """

    def __init__(self, runs: Runs, seed: str, out: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._runs, self._out = runs, out
        self._random = Random(seed)
        self._refusable: Damage | None = None

    def play(self) -> None:
        """Strike, damage and resume, to the end; each is printed before it is done.

        Raises:
            AssertionError: the run was lost, or is another.
        """
        for _ in range(self._random.randint(1, 3)):
            strike = self._draw()
            print(strike)
            if self._resume(strike).code == 0:
                print("which came too late")
                self.counts["missed"] += 1
                break
            self.counts[strike.kind] += 1
            if self._refusable is None and self._random.random() < 0.75:
                self._damage()
        self._resume()
        self._compare()

    def _draw(self) -> Strike:
        random, runs = self._random, self._runs
        # A refusal to go on and an error of a full disk could not be told apart.
        kinds = [kind for kind in EXITS if kind != "disk full" or self._refusable is None]
        kind = random.choice(kinds)
        if kind == "killed by the clock":
            return Strike(kind, seconds=random.uniform(0.1, 1) * runs.seconds)
        ahead = Counter(part for part, _ in runs.moments[self._position() :])
        if len(ahead) > 1:
            del ahead["lock"]  # the last of all, after which there is nothing to write
        part = random.choice(sorted(ahead))
        size = random.choice(runs.sizes.get(part, [1000]))
        return Strike(kind, part, random.randint(1, ahead[part]), random.randrange(size))

    def _position(self) -> int:
        """Of the moments, the first that a run from what is on the disk must still come to."""
        renames = [name for _, name in self._runs.moments]
        there = [at for at, name in enumerate(renames) if name and (self._out / name).exists()]
        return max(there, default=-1) + 1

    def _damage(self) -> None:
        done = damage(self._random, self._out)
        if done is None:
            return
        print("then", done.said)
        self.counts["damages"] += 1
        self._refusable = done if done.refusable else None

    def _resume(self, strike: Strike | None = None) -> Ended:
        ended = self._process(strike)
        if ended.code == 1 and self._refusable is not None:
            line = self._one_line(ended)
            assert self._refusable.named_in(line), line
            print("restored:", self._refusable.undo())
            self.counts["refused"] += 1
            self._refusable = None
            ended = self._process(strike)
        expected = 0 if strike is None else EXITS[strike.kind]
        assert ended.code in (0, expected), "\n".join((f"exit code {ended.code}", *ended.lines))
        if ended.code == 1:
            assert "cannot write" in self._one_line(ended)
        return ended

    def _process(self, strike: Strike | None) -> Ended:
        ended = self._runs.process(self._out, strike)
        mended = len(ended.lines) - len(ended.errors)
        self.counts["passed over or restored"] += mended
        if mended:  # and not refused
            self._refusable = None
        return ended

    def _one_line(self, ended: Ended) -> str:
        """The error for the user, which names what it is about."""
        assert len(ended.errors) == 1, "\n".join(("not one line:", *ended.errors))
        line = ended.errors[0]
        assert line.startswith("error: "), line
        assert str(self._out) in line, line
        return line

    def _compare(self) -> None:
        parts = (".", "reference") if (self._runs.out / "reference").exists() else (".",)
        for part in parts:
            whole, resumed = self._runs.out / part, self._out / part
            assert tiny_runs.read_metrics(resumed) == tiny_runs.read_metrics(whole)
            results = [json.loads((at / "result.json").read_text()) for at in (whole, resumed)]
            for measured in ("start", "end"):
                assert results[0][measured] == results[1][measured]
            for file in (whole / "final").iterdir():
                assert (resumed / "final" / file.name).read_bytes() == file.read_bytes(), file
            assert not list(resumed.glob("*.tmp"))
