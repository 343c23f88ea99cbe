"""Where the time of a whole conversion goes: every step on its own, their sum, and the whole.

Run `python benchmarks/convert.py CHECKPOINT [options of abliterate convert]`. Steps within steps count once, where they
are.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FUNCTIONS = {
    "abliterate.conversion": {
        "open_subject": "read headers, plan",
        "prepare": "tokenizer, chat format, prompts",
        "load_model": "load weights",
        "assemble": "certificate: writers",
        "publish_files": "manifest, card, plot",
        "_finish": "flush to disk, rename",
    },
    "abliterate.studying": {"load_model": "load weights"},
    "abliterate.rewriting": {
        "build_edits": "projectors",
        "rewrite_checkpoint": "rewrite",
        "carry_over": "carry files over",
    },
    "abliterate.proving": {"load_model": "load weights"},
}


class Clock:
    """Seconds by step; the time of a step within another one is not the other one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[float] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._open.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            inner = self._open.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - inner
            if self._open:
                self._open[-1] += whole

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.step(name):
                return function(*args, **kwargs)

        return timed


def convert(words: list[str]) -> None:
    """Runs the command line in this process, and prints the table."""
    begun = float(os.environ["BENCHMARK_BEGUN"])
    clock = Clock()
    with clock.step("load libraries"):
        from abliterate import cli
        from abliterate.terminal import ENVIRONMENT

        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        modules = {name: importlib.import_module(name) for name in FUNCTIONS}
        from abliterate.journal import Journal
    for module, functions in FUNCTIONS.items():
        for function, title in functions.items():
            setattr(modules[module], function, clock.wrapped(title, getattr(modules[module], function)))
    stage = Journal.stage

    def timed_stage(self: Journal, name: str, kind: Any, make: Callable[[], Any]) -> Any:
        with clock.step(name):
            return stage(self, name, kind, make)

    Journal.stage = timed_stage  # type: ignore[method-assign]
    cli.cli(["convert", *words], standalone_mode=False)
    whole = time.time() - begun
    print(f"\n{os.cpu_count()} cores\n\n| step | seconds | share |\n| --- | ---: | ---: |")
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"| {name} | {seconds:.2f} | {seconds / whole:.1%} |")
    total = sum(clock.seconds.values())
    print(f"| **sum of the steps** | {total:.2f} | {total / whole:.1%} |\n| **whole command** | {whole:.2f} | 100.0% |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--folder", type=Path, help="where there is room (default: the system's temporary folder)")
    args, words = parser.parse_known_args()
    place = Path(tempfile.mkdtemp(dir=args.folder, prefix="abliterate-benchmark-"))
    try:
        command = [sys.executable, __file__, "--inside", args.checkpoint, str(place / "out"), *words]
        subprocess.run(command, check=True, env=os.environ | {"BENCHMARK_BEGUN": str(time.time())})
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        convert(sys.argv[2:])
    else:
        main()
