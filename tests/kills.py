"""Kills conversions at random moments and lets the same command go on, until each gives what an undisturbed one gives.

`python -m tests.kills --pico 180 --subject 20 --seed 0`. Three kills of four are kill -9, one is Ctrl-C; half are at a
moment drawn from the time that a run takes, half right after a step of it, so that short steps are hit as well.

This process imports what the command line imports and computes nothing; every run is a fork of it, so that none waits
for imports (a fork of a process whose OpenMP has run would hang: models are therefore made in forks too, and a run has
one thread).
"""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot  # noqa: F401 - so that forks have it
import transformers.models.llama.modeling_llama  # noqa: F401

from abliterate import cli, conversion, dryrun  # noqa: F401
from abliterate.publish import summary  # noqa: F401
from tests import pico

ROOT = Path(__file__).parents[1]
BUILD = Path(os.environ.get("ABLITERATE_TEST_BUILD", ROOT / "build"))
PATIENCE, STEPS = 600, 24
QUICK = """
name: quick
calibration: {{train: {train}, validation: {held}, test: {held}}}
direction: {{filter: false, refusal_tokens: [I, S], positions: 2}}
selection: {{max_kl: 1000000.0, min_induce: -1000000.0}}
evaluation: {{max_new_tokens: 4}}
"""


def forked(work: Callable[[], None], log: Path | None = None) -> int:
    """Does the work in a child of this process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        said = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(said, 1)
        os.dup2(said, 2)
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float = PATIENCE) -> int | None:
    """The exit status of a child, negative for a signal; None where it has not ended by then."""
    limit = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        left = limit - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(0.002, left))


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass
class Tally:
    """What was seen."""

    kills: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    identical: int = 0
    faults: list[str] = field(default_factory=list)
    full: float = 0.0


@dataclass
class Trial:
    """Conversions of one model.

    Attributes:
        base: the model. `recipe`: a file. `room`: an empty folder for outputs.
    """

    base: Path
    recipe: Path
    room: Path
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.inputs = contents(self.base) | contents(self.recipe.parent)
        started = time.monotonic()
        self.out = self.room / "reference" / "out"
        self.out.parent.mkdir(parents=True)
        assert ended(self.start(False)) == 0, self.said()
        self.tally.full = time.monotonic() - started
        self.wanted = contents(self.out)

    def start(self, overwrite: bool) -> int:
        words = ["convert", str(self.base), str(self.out), "--recipe", str(self.recipe)]
        argv = ["abliterate", *words, *(["--overwrite"] if overwrite else [])]

        def work() -> None:
            sys.argv = argv
            signal.signal(signal.SIGINT, signal.default_int_handler)
            cli.main()

        return forked(work, self.room / "said.txt")

    def said(self) -> str:
        return (self.room / "said.txt").read_text()

    @property
    def work(self) -> Path:
        return self.out.with_name(".out.abliterate-work")

    def place(self) -> str:
        """Where in the conversion a run was killed, by what it left."""
        if not self.work.is_dir():
            return "after the end" if self.old is None and self.out.exists() else "before any file"
        if not (self.work / "journal.json").exists():
            return "before the first stage" if (self.work / "out").exists() else "while cleaning up"
        journal = json.loads((self.work / "journal.json").read_text())
        if not (self.work / "out").exists():
            return "published, not cleaned up"
        last = [*journal["stages"]][-1]
        if journal["shards"] and not last.endswith("after"):
            return f"after shard {len(journal['shards'])}"
        return f"after {last}"

    def sequence(self, number: int, kills: int, chance: random.Random) -> int:
        """Kills one conversion again and again, at most `kills` times, until it is done; returns how often."""
        self.out = self.room / str(number) / "out"
        overwrite = number % 3 == 2
        self.old: dict[str, str] | None = None
        self.out.parent.mkdir()
        if overwrite:
            self.out.mkdir()
            (self.out / "config.json").write_text("{}")
            self.old = contents(self.out)
        used = 0
        while used < kills:
            pid = self.start(overwrite)
            status = self.moment(pid, chance)
            if status is not None:
                self.finish(status)
                return used
            status = self.kill(pid, chance.random() < 0.25)
            used += status != 0
            if status == 0 or self.done:
                self.finish(0)
                return used
        self.finish(ended(self.start(overwrite)))
        return used

    def moment(self, pid: int, chance: random.Random) -> int | None:
        """Waits for a random moment: of the time that a run takes, or soon after one of the steps that can be seen."""
        if chance.random() < 0.5:
            return ended(pid, chance.uniform(0, self.tally.full))
        steps, last = chance.randint(0, STEPS), self.step()
        while steps:
            status = ended(pid, 0.0005)
            if status is not None:
                return status
            steps, last = steps - (self.step() != last), self.step()
        return ended(pid, chance.uniform(0, 0.01 * self.tally.full))

    def step(self) -> list[tuple[int, int] | None]:
        """What a run has come to: files that come, change and go as it proceeds."""
        seen = []
        for path in (self.out, self.work, *(self.work / name for name in ("journal.json", "out", "old", "stages"))):
            try:
                seen.append((path.stat().st_ino, path.stat().st_mtime_ns))
            except OSError:
                seen.append(None)
        return seen

    @property
    def done(self) -> bool:
        return self.out.exists() and not self.work.exists() and contents(self.out) == self.wanted

    def kill(self, pid: int, gently: bool) -> int:
        """Ends a run, and looks at what it left; returns the status, 0 where it was done before it was hit."""
        os.kill(pid, signal.SIGINT if gently else signal.SIGKILL)
        status = ended(pid)
        if status == 0:
            return 0
        assert status is not None
        self.tally.kills["Ctrl-C" if gently else "kill -9"] += 1
        self.tally.places[self.place()] += 1
        if gently:
            self.check_word(status)
        self.look()
        return status

    def check_word(self, status: int) -> None:
        """Ctrl-C ends in one line that says whether there is something to continue."""
        words = self.said().strip().splitlines()[-1:]
        kept = (self.work / "journal.json").exists() and (self.work / "out").exists()
        done = self.out.exists() and contents(self.out) == self.wanted
        word = "run the same command again to continue" if kept else f"{self.out} was done by then"
        wanted = [f"interrupted: {word if kept or done else 'nothing was written'}"]
        if status == 130 and words != wanted:
            self.tally.faults.append(f"Ctrl-C said {words}, work folder {'kept' if kept else 'gone'}")
        elif status not in (130, 70, -signal.SIGINT) and not (status == 1 and done):
            self.tally.faults.append(f"Ctrl-C ended with {status}: {words}")

    def look(self) -> None:
        """OUT is whole, or not there, or what was there before; inputs are what they were."""
        if self.out.exists() and contents(self.out) not in (self.wanted, self.old):
            self.tally.faults.append(f"OUT was half-made: {sorted(contents(self.out))}")
        if self.old is not None and not self.out.exists() and not (self.work / "old").exists():
            self.tally.faults.append("the OUT that was to be replaced is gone")
        if contents(self.base) | contents(self.recipe.parent) != self.inputs:
            self.tally.faults.append("an input has changed")

    def finish(self, status: int | None) -> None:
        """The run went to its end: the result is the undisturbed one, and nothing lies beside it."""
        if status == 1 and self.old is None and "is not empty" in self.said():
            status = 0  # killed after OUT had its place: the next run says that it is there, and cleans up
        self.look()
        self.tally.resumed += status == 0
        same = self.out.exists() and contents(self.out) == self.wanted
        self.tally.identical += same
        left = sorted(path.name for path in self.out.parent.iterdir())
        if status != 0 or not same or left != ["out"]:
            self.tally.faults.append(f"ended with {status}, identical: {same}, left {left}: {self.said()[-500:]}")
        shutil.rmtree(self.out.parent)


def tried(trial: Trial, kills: int, seed: int) -> Tally:
    """Conversions until that many kills have hit."""
    chance, used, number = random.Random(seed), 0, 0
    while used < kills and len(trial.tally.faults) < 5:
        used += trial.sequence(number, kills - used, chance)
        number += 1
        for fault in trial.tally.faults:
            print(fault, file=sys.stderr)
        print(f"{used} of {kills} kills, {len(trial.tally.faults)} faults", end="\r", file=sys.stderr, flush=True)
    return trial.tally


def made(folder: Path, kind: str, subject: Path | None) -> Trial:
    """A model and a recipe for it."""
    (folder / "recipe").mkdir(parents=True)
    if kind == "pico":
        base, sizes = folder / "base", SimpleNamespace(train=16, held=4)
        assert ended(forked(lambda: save_pico(base))) == 0
    else:
        base, sizes = subject or BUILD / "refusing-smollm2-135m-sharded", SimpleNamespace(train=24, held=8)
        if subject is None:
            script = [sys.executable, str(ROOT / "tests/models/subject.py"), str(base), "--max-shard-size", "60MB"]
            subprocess.run(script, check=True)
    recipe = folder / "recipe" / "quick.yaml"
    recipe.write_text(QUICK.format(train=sizes.train, held=sizes.held))
    (folder / "room").mkdir()
    return Trial(base, recipe, folder / "room")


def save_pico(base: Path) -> None:
    pico.save(base, "llama", tied=True, shards=3, tokenizer=True)
    (base / "README.md").write_text("# Base\n")


def table(kind: str, tally: Tally) -> str:
    """What came out, as text."""
    finished = tally.resumed
    lines = [
        f"{kind}: an undisturbed run takes {tally.full:.1f} s",
        f"  kills                      {sum(tally.kills.values())} ({dict(tally.kills)})",
        f"  conversions brought to end {finished}",
        f"  byte-identical             {tally.identical}",
        f"  faults                     {len(tally.faults)}",
        *(f"    {fault}" for fault in tally.faults),
        "  where they hit:",
        *(f"    {place:<36} {count}" for place, count in sorted(tally.places.items(), key=lambda item: -item[1])),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pico", type=int, default=180, metavar="KILLS")
    parser.add_argument("--subject", type=int, default=20, metavar="KILLS")
    parser.add_argument("--subject-folder", type=Path, help="a refusing model (default: built, in several shards)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    faults = 0
    for kind in ("pico", "subject"):
        kills = getattr(given, kind)
        if kills:
            with tempfile.TemporaryDirectory() as folder:
                tally = tried(made(Path(folder), kind, given.subject_folder), kills, given.seed)
            print(table(kind, tally), flush=True)
            faults += len(tally.faults)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
