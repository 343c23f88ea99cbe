"""Interrupts pushes at random points and runs the same command again, until each repository is complete.

`python -m tests.interrupts --pushes 20 --converts 10 --drops 10 --seed 0`; drops are conversions with `--drop-shards`
of a model that is on the Hub too. An interruption is kill -9 or Ctrl-C, at a moment drawn
from what the Hub has seen by then (bytes, requests) or from time alone, or a connection that the Hub cuts in the middle
of a file or of the commit. `--folder` pushes a checkpoint of yours instead of a pico model.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests import pico
from tests.commandline import snapshot
from tests.hub_request import BLOCK
from tests.hub_store import Fault, Store
from tests.hub_uploads import uploads

NAME, MODEL, LIMIT = "org/name", "org/base", 12_000_000
STILL = "error: "
CUTS = "PUT /lfs/|PUT /part/|POST .*/commit/|POST .*/preupload/|info/lfs"


@dataclass
class Tally:
    """What was seen."""

    kinds: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    complete: int = 0
    sent: int = 0
    needed: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Trial:
    """One command, interrupted until it is done.

    Attributes:
        words: the command. `out`: what is to be there in the end. `said`: where messages of the last run are.
        wanted: the folder that the repository is to hold in the end.
        store: the Hub. `seconds`: what an undisturbed run takes.
    """

    words: list[str]
    out: Path
    wanted: Path
    said: Path
    store: Store
    seconds: float
    chance: random.Random
    tally: Tally

    def until_done(self, most: int) -> int:
        """Interrupts at most so often; returns how often."""
        used = 0
        while used < most:
            kind = self.chance.choice(["kill -9", "Ctrl-C", "cut"])
            status = self.cut() if kind == "cut" else self.stopped(kind)
            used += status != 0 or self.was_cut
            self.tally.kinds[kind] += status != 0 or self.was_cut
            self.look(status, kind)
            if status == 0:
                self.finish()
                return used
        self.store.faults = []
        process = self.start()
        process.wait()
        self.look(process.returncode, "the last run")
        self.finish()
        return used

    was_cut = False

    def start(self) -> "subprocess.Popen[bytes]":
        self.tally.runs += 1
        home = {"HF_HOME": str(self.out.parent / "home")} if self.out != self.wanted else {}
        own = {"HF_ENDPOINT": self.store.url, "HF_TOKEN": self.store.token, "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **own, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **home}
        command = [sys.executable, "-m", "abliterate", *self.words]
        with self.said.open("wb") as said:
            return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)

    def cut(self) -> int:
        """The Hub hangs up once, somewhere in the middle; the run goes on by itself, or ends."""
        fault = Fault(CUTS, cut=self.chance.randint(0, 20 * BLOCK), after=self.chance.randint(0, 12))
        self.store.faults = [fault]
        process = self.start()
        process.wait()
        self.was_cut, self.store.faults = fault.times == 0, []
        return process.returncode

    def stopped(self, kind: str) -> int:
        """Ends the run from outside; returns 0 where it was done before that."""
        self.was_cut = False
        process = self.start()
        self.wait(process)
        process.send_signal(signal.SIGKILL if kind == "kill -9" else signal.SIGINT)
        process.wait()
        return process.returncode

    def wait(self, process: "subprocess.Popen[bytes]") -> None:
        """Until a random point: of bytes, of requests, or of time."""
        store, began = self.store, time.monotonic()
        unit = self.chance.choice(["bytes", "bytes", "requests", "time"])
        bytes_, requests = store.received, len(store.seen)
        left = max(0, sum(map(len, snapshot(self.out).values())) if self.out.exists() else 30_000_000)
        goal = {"bytes": left / 3, "requests": 30, "time": self.seconds}[unit] * self.chance.random()
        while process.poll() is None:
            done = {
                "bytes": store.received - bytes_,
                "requests": len(store.seen) - requests,
                "time": time.monotonic() - began,
            }
            if done[unit] > goal or done["time"] > 5 * self.seconds:
                return
            time.sleep(0.001)

    def look(self, status: int, kind: str) -> None:
        """The end was a clean one, and no commit is half-made."""
        lines = self.said.read_text(errors="replace").strip().splitlines()
        repository = self.store.repositories.get(NAME)
        if repository and len(repository.log) > 1:
            self.tally.faults.append(f"{len(repository.log)} commits after {kind}")
        names = {frozenset(repository.files(commit)) for commit in repository.log} if repository else set()
        wanted = frozenset(self.wanted.iterdir()) if self.out.exists() else None
        if wanted is not None and names - {frozenset({".gitattributes", *(path.name for path in wanted)})}:
            self.tally.faults.append(f"half-made after {kind}: {names}")
        last = lines[-1] if lines else ""
        clean = status in (0, -signal.SIGKILL) or (status == 130 and last.startswith("interrupted: "))
        clean = clean or (kind == "cut" and status == 1 and last.startswith(STILL))
        if not clean:
            self.tally.faults.append(f"{kind} ended with {status}: {lines[-5:]}")

    def finish(self) -> None:
        """Complete, to the byte, in one commit, and no file stored twice."""
        wanted = snapshot(self.wanted)
        whole = NAME in self.store.repositories and self.store.complete(NAME, wanted)
        commits = len(self.store.repositories[NAME].log) if whole else 0
        once = set(self.store.stored.values()) <= {1} and set(self.store.repositories[NAME].branches) == {"main"}
        self.tally.complete += whole and commits == 1 and once
        self.tally.sent += self.store.received
        self.tally.needed += sum(map(len, self.store.large.values()))
        if not whole or commits != 1 or not once:
            self.tally.faults.append(f"complete: {whole}, commits: {commits}, stored: {self.store.stored}")


def tried(room: Path, folder: Path | None, kind: str, times: int, seed: int) -> Tally:
    """Pushes, or conversions that push, until that many interruptions have hit."""
    chance, tally, used = random.Random(seed), Tally(), 0
    number = 0
    while used < times and len(tally.faults) < 5:
        number += 1
        with uploads() as store:
            store.slow, store.part_bytes = 0.001, (0, 500_000)[number % 2]
            words, out, wanted = command(room, folder, kind, number)
            if kind == "drop":
                store.serve(MODEL, room / "base")
            trial = Trial(words, out, wanted, room / "said.txt", store, 4.0, chance, tally)
            used += trial.until_done(times - used)
        print(f"{used} of {times} interruptions, {len(tally.faults)} faults", end="\r", file=sys.stderr, flush=True)
    return tally


def command(room: Path, folder: Path | None, kind: str, number: int) -> tuple[list[str], Path, Path]:
    """What is run, what it makes here, and the folder that the repository is to hold."""
    given = ["--direction", str(room / "r.safetensors"), "--no-evaluate", "--push-to", NAME]
    if kind == "convert":
        out = room / f"out{number}"
        return ["convert", str(room / "base"), str(out), *given], out, out
    if kind == "drop":
        out = room / f"drop{number}" / "out"
        limit = ["--drop-shards", "--cache-limit", f"{LIMIT}B"]
        return ["convert", MODEL, str(out), *given, *limit], out, room / "kept" / "out"
    return ["push", str(folder or room / "converted"), NAME], *[folder or room / "converted"] * 2


def prepare(room: Path) -> None:
    """A pico model in several shards of some megabytes, and a conversion of it."""
    base = pico.save(room / "base", "llama", shards=6, tokenizer=True, vocab_size=30_000, intermediate_size=4000)
    direction = pico.direction_file(room / "r.safetensors")
    words = ["convert", str(base), str(room / "converted"), "--direction", str(direction), "--no-evaluate", "-q"]
    subprocess.run([sys.executable, "-m", "abliterate", *words], check=True)


def keep(room: Path) -> None:
    """What a conversion makes of the same model on the Hub that keeps its shards."""
    with uploads() as store:
        store.serve(MODEL, room / "base")
        words = ["convert", MODEL, str(room / "kept/out"), "--direction", str(room / "r.safetensors"), "--no-evaluate"]
        own = {"HF_ENDPOINT": store.url, "HF_HOME": str(room / "home"), "HF_HUB_OFFLINE": "0"}
        settings = {**os.environ, **own, "HF_TOKEN": store.token, "HF_HUB_DISABLE_XET": "1"}
        subprocess.run([sys.executable, "-m", "abliterate", *words, "-q"], env=settings, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pushes", type=int, default=20, metavar="TIMES")
    parser.add_argument("--converts", type=int, default=10, metavar="TIMES")
    parser.add_argument("--drops", type=int, default=10, metavar="TIMES")
    parser.add_argument("--folder", type=Path, help="a converted checkpoint to push (default: a pico model)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        if given.drops:
            keep(Path(place))
        for kind, times in (("push", given.pushes), ("convert", given.converts), ("drop", given.drops)):
            if not times:
                continue
            tally = tried(Path(place), given.folder, kind, times, given.seed)
            faults += len(tally.faults)
            print(json.dumps({"command": kind, **vars(tally), "kinds": dict(tally.kinds)}, indent=1))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
