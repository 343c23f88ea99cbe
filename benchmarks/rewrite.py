"""The rewrite beside `cp` and fsync of the same files: time, ratio, and peak memory of each as a process of its own.

Run `python benchmarks/rewrite.py --gigabytes 2`. A direction is given, nothing is calibrated or certified: what is
timed is reading every shard, editing every residual writer, writing every shard, and having it on the disk.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SYNTHETIC = Path(__file__).with_name("synthetic.py")
COPY = 'cp "$0"/* "$1"/ && sync -d "$1"/*'
REWRITE = """
import sys
from pathlib import Path
import torch
from abliterate.checkpoint.carry import carry_over
from abliterate.checkpoint.rewrite import rewrite_checkpoint
from abliterate.edit.edits import build_edits
from abliterate.subject import open_subject
subject = open_subject(sys.argv[1])
direction = torch.randn(subject.plan.hidden_size, generator=torch.Generator().manual_seed(1))
edits = build_edits(subject.checkpoint, subject.plan, direction)
rewrite_checkpoint(subject.checkpoint, Path(sys.argv[2]), edits, hash_files=sys.argv[3] == "hash")
carry_over(subject.checkpoint, Path(sys.argv[2]))
"""


@dataclass(frozen=True)
class Run:
    """One process: wall seconds, and peak resident memory in bytes."""

    seconds: float
    peak: int


def run(command: Sequence[str], source: Path, *words: str) -> Run:
    """Runs a command on the checkpoint and a fresh output folder."""
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        start = time.perf_counter()
        process = subprocess.Popen([*command, str(source), out, *words])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"{command[0]} failed")
        return Run(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def imports() -> float:
    """Seconds that Python takes to start and load the libraries, which a copy does not."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", REWRITE.split("subject =")[0]], check=True)
    return time.perf_counter() - start


def report(source: Path, size: int, repeats: int) -> None:
    """Prints one table; of each command the fastest run and the largest memory count."""
    commands = {
        "cp + fsync": (["sh", "-c", COPY], ()),
        "rewrite": ([sys.executable, "-c", REWRITE], ("plain",)),
        "rewrite + sha256": ([sys.executable, "-c", REWRITE], ("hash",)),
    }
    started = imports()
    print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, {repeats} runs each, files in the page cache")
    print(f"start of Python and its libraries: {started:.1f} s, within the rewrites' times\n")
    print("| command | seconds | without start, of cp | peak RSS, MB |\n| --- | ---: | ---: | ---: |")
    runs = {name: [run(command, source, *words) for _ in range(repeats)] for name, (command, words) in commands.items()}
    copied = min(run.seconds for run in runs["cp + fsync"])
    for name, done in runs.items():
        seconds, peak = min(run.seconds for run in done), max(run.peak for run in done)
        working = seconds if name.startswith("cp") else seconds - started
        print(f"| {name} | {seconds:.2f} | {working / copied:.2f} | {peak / 1e6:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where there is room (default: the system's temporary folder)")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder, prefix="abliterate-benchmark-"))
    try:
        # in a process of its own: the peak memory of what this one starts would else begin at that of torch
        made = [sys.executable, str(SYNTHETIC), str(work / "base"), "--gigabytes", str(args.gigabytes)]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        report(work / "base", sum(path.stat().st_size for path in (work / "base").iterdir()), args.repeats)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
