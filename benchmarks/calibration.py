"""Calibration streamed and in memory: time, peak memory, bytes of weights read, and whether they find the same.

Run `python benchmarks/calibration.py CHECKPOINT [--limit 900MB]`. The streamed run is held to the limit by the system:
by a memory cgroup where one can be made, else by RLIMIT_DATA.
"""

import argparse
import filecmp
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from abliterate.sizes import parse_memory

CHILD = """
import sys, json, os
from abliterate.terminal import ENVIRONMENT
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
from pathlib import Path
import abliterate.subject
from abliterate import find
loaded = []
real = find.load_model
def load(*args, **kwargs):
    loaded.append(real(*args, **kwargs))
    return loaded[-1]
find.load_model = load
model, recipe, out, memory, dtype = sys.argv[1:]
options = abliterate.subject.RunOptions(memory=memory, dtype=dtype, scratch=Path(out).parent)
find.find_direction(model, recipe=recipe, out=out, options=options, overwrite=True)
runner = loaded[0].runner
print(json.dumps({"read": runner.store.bytes_read if runner.streamed else 0}))
"""
RECIPE = """
name: benchmark
calibration: {{train: {train}, validation: {validation}, test: 1}}
"""


@dataclass(frozen=True)
class Run:
    """One process: wall seconds, its peaks of anonymous and of all resident memory, and bytes of weights it read."""

    seconds: float
    anonymous: int
    resident: int
    read: int


@contextmanager
def limited(size: int | None) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """Yields what holds a process to the limit, in words and as something to call in it before it starts."""
    if size is None:
        yield "no limit", None
        return
    for root, limit in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        group = Path(root) / f"abliterate-benchmark-{os.getpid()}"
        if not (Path(root) / limit).exists() and not (Path(root) / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
            (group / limit).write_text(str(size))
        except OSError:
            continue
        try:
            yield f"a memory cgroup of {size / 1e6:.0f} MB", partial(_join, group / "cgroup.procs")
        finally:
            group.rmdir()
        return
    yield f"RLIMIT_DATA of {size / 1e6:.0f} MB", lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _join(procs: Path) -> None:
    procs.write_text(str(os.getpid()))


def run(words: list[str], enter: Callable[[], None] | None) -> Run:
    """Runs a child and watches its memory."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words], stdout=subprocess.PIPE, text=True, preexec_fn=enter
    )
    peaks = {"RssAnon": 0, "VmHWM": 0}
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks))
    watcher.start()
    said = process.communicate()[0]
    watcher.join()
    if process.returncode:
        raise SystemExit(f"the calibration failed ({process.returncode})")
    return Run(time.perf_counter() - start, peaks["RssAnon"], peaks["VmHWM"], json.loads(said)["read"])


def _watch(pid: int, peaks: dict[str, int]) -> None:
    """Reads the system's figures until the process is gone."""
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        found = {line.split(":")[0]: line.split() for line in lines}
        if "RssAnon" not in found:
            return
        for name in peaks:
            peaks[name] = max(peaks[name], int(found[name][1]) * 1024)
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--limit", type=parse_memory, help="of the streamed run, such as 900MB")
    parser.add_argument("--dtype", default="auto", help="to compute in")
    parser.add_argument("--train", type=int, default=24, help="prompts of each set")
    parser.add_argument("--validation", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where there is room (default: the system's temporary folder)")
    args = parser.parse_args()
    size = sum(path.stat().st_size for path in args.checkpoint.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=args.folder) as place, limited(args.limit) as (held, enter):
        recipe = Path(place) / "recipe.yaml"
        recipe.write_text(RECIPE.format(train=args.train, validation=args.validation))
        print(
            f"{size / 1e9:.2f} GB of weights, {os.cpu_count()} cores, {args.train} + {args.validation} prompts a set;"
        )
        print(f"the streamed run in {held}\n")
        print("| weights | seconds | peak anonymous, MB | peak RSS, MB | read, GB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for memory in ("streamed", "resident"):
            out = Path(place) / f"{memory}.safetensors"
            words = [str(args.checkpoint), str(recipe), str(out), memory, args.dtype]
            done = run(words, enter if memory == "streamed" else None)
            figures = (f"{done.anonymous / 1e6:.0f}", f"{done.resident / 1e6:.0f}", f"{done.read / 1e9:.1f}")
            print(f"| {memory} | {done.seconds:.1f} | {' | '.join(figures)} |", flush=True)
        same = filecmp.cmp(Path(place) / "streamed.safetensors", Path(place) / "resident.safetensors", shallow=False)
        print(f"\nthe direction files are {'the same, byte for byte' if same else 'NOT THE SAME'}")


if __name__ == "__main__":
    main()
