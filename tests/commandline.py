"""The command line, in a process of its own or, where that shows the same, in this one."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from abliterate.cli import main

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def run(*words: str | Path, **options: Any) -> Ran:
    """Runs `python -m abliterate` to its end; `options` go to `subprocess.run`."""
    with start(*words, **options) as process:
        out, err = process.communicate(timeout=120)
    return Ran(process.returncode, out, err)


def start(*words: str | Path, **options: Any) -> "subprocess.Popen[str]":
    """Starts `python -m abliterate`, offline, with pipes."""
    command = [sys.executable, "-m", "abliterate", *map(str, words)]
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def run_here(*words: str | Path) -> Ran:
    """Runs `main` in this process. Warnings go to the test's own log, not to `err`."""
    log = logging.getLogger("abliterate")
    level, out, err = log.level, io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["abliterate", *map(str, words)]),
        mock.patch.dict(os.environ, OFFLINE),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            return Ran(int(end.code or 0), out.getvalue(), err.getvalue())
        finally:
            log.setLevel(level)
    raise AssertionError("main returned")


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden names included."""
    return sorted(path.name for path in folder.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
