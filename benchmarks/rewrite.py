"""The rewrite beside `cp` and fsync of the same files: time, ratio, and peak memory of each as a process of its own.

Run `python benchmarks/rewrite.py --gigabytes 1 --gigabytes 4 --gigabytes 16`. A direction is given, nothing is
calibrated or certified: what is timed is reading every shard, editing every residual writer, writing every shard, and
having it on the disk. CPU seconds alone count Python's start, the libraries and the plan as well. With Numba (the extra
`fast`) kernels are compiled before, and loaded within the time.
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

from shapes import MODELS

SYNTHETIC = Path(__file__).with_name("synthetic.py")
COPY = 'cp "$0"/* "$1"/ && sync -d "$1"/*'
REWRITE = """
import sys, time
if sys.argv[4] == "torch":
    sys.modules["numba"] = None  # as if it were not installed
from pathlib import Path
import torch
from abliterate.checkpoint.carry import carry_over
from abliterate.checkpoint.rewrite import rewrite_checkpoint
from abliterate.edit.edits import build_edits
from abliterate.subject import open_subject
subject = open_subject(sys.argv[1])
direction = torch.randn(subject.plan.hidden_size, generator=torch.Generator().manual_seed(1))
start = time.perf_counter()
edits = build_edits(subject.checkpoint, subject.plan, direction)
rewrite_checkpoint(subject.checkpoint, Path(sys.argv[2]), edits, hash_files=sys.argv[3] == "hash")
carry_over(subject.checkpoint, Path(sys.argv[2]))
print(time.perf_counter() - start)
"""
COMMANDS = {
    "cp + fsync": (["sh", "-c", COPY], ()),
    "rewrite --no-hash": ([sys.executable, "-c", REWRITE], ("plain", "numba")),
    "rewrite": ([sys.executable, "-c", REWRITE], ("hash", "numba")),
    "rewrite --no-hash, without Numba": ([sys.executable, "-c", REWRITE], ("plain", "torch")),
    "rewrite, without Numba": ([sys.executable, "-c", REWRITE], ("hash", "torch")),
}
COMPILE = "from abliterate.edit.fused import fused; raise SystemExit(fused() is None)"


@dataclass(frozen=True)
class Run:
    """One process: wall seconds of its work, CPU seconds, and peak resident memory in bytes."""

    seconds: float
    cpu: float
    peak: int


def run(command: Sequence[str], source: Path, *words: str) -> Run:
    """Runs a command on the checkpoint and a fresh output folder; a number that it prints is the time of its work."""
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        os.sync()
        start = time.perf_counter()
        process = subprocess.Popen([*command, str(source), out, *words], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = float(printed) if printed else time.perf_counter() - start
        if status:
            raise SystemExit(f"{command[0]} failed")
        scale = 1 if sys.platform == "darwin" else 1024
        return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale)


def forget(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def recall(folder: Path) -> None:
    """Brings a folder's files into the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def measure(source: Path, repeats: int, cold: bool) -> dict[str, list[Run]]:
    """Runs all commands in turn, so that a busy machine slows all of them."""
    chosen = commands()
    runs: dict[str, list[Run]] = {name: [] for name in chosen}
    for _ in range(repeats):
        for name, (command, words) in chosen.items():
            (forget if cold else recall)(source)
            runs[name].append(run(command, source, *words))
    return runs


def report(source: Path, repeats: int) -> None:
    """Prints rows of the table; of each command the fastest run and the largest memory count."""
    size = sum(path.stat().st_size for path in source.iterdir())
    for cold in (False, True):
        runs = measure(source, repeats, cold)
        copied = min(run.seconds for run in runs["cp + fsync"])
        for name, done in runs.items():
            seconds, peak = min(run.seconds for run in done), max(run.peak for run in done)
            cpu, state = min(run.cpu for run in done), "cold" if cold else "warm"
            row = f"| {size / 1e9:.2f} | {state} | {name} | {seconds:.2f} | {seconds / copied:.2f} | {cpu:.1f} "
            print(f"{row}| {peak / 1e6:.0f} |", flush=True)


def commands() -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """All of them; those without Numba alone where it is not there. Its kernels are compiled here, not in a run."""
    compiled = subprocess.run([sys.executable, "-c", COMPILE], check=False).returncode == 0
    return {name: command for name, command in COMMANDS.items() if compiled or "numba" not in command[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(MODELS), default="llama-3-8b")
    parser.add_argument("--gigabytes", type=float, action="append", help="may be given several times (default: 4)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where there is room (default: the system's temporary folder)")
    args = parser.parse_args()
    print(f"{args.shape}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.repeats} runs each in turn, the")
    print("fastest of each; warm: files in the page cache; cold: taken out of it by posix_fadvise\n")
    print("| GB | cache | command | seconds | of cp | CPU s | peak RSS, MB |")
    print("| ---: | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for gigabytes in args.gigabytes or [4.0]:
        work = Path(tempfile.mkdtemp(dir=args.folder, prefix="abliterate-benchmark-"))
        try:
            # in a process of its own: the peak memory of what this one starts would else begin at that of torch
            made = [sys.executable, str(SYNTHETIC), str(work / "base"), "--gigabytes", str(gigabytes)]
            subprocess.run([*made, "--shape", args.shape], check=True, stdout=subprocess.DEVNULL)
            os.sync()
            report(work / "base", args.repeats)
        finally:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
