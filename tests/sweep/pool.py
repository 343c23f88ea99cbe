"""Cases side by side, each in a process with one thread."""

import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from abliterate.terminal import ENVIRONMENT
from tests.sweep.twins import Case

T = TypeVar("T")
_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def each(function: Callable[[Case, int], T], chosen: Sequence[Case], jobs: int, seed: int = 0) -> Iterator[T]:
    """What a function makes of each case and the seed, as it comes; a bar on stderr where that is a terminal."""
    for key, value in {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}.items():
        os.environ.setdefault(key, value)
    spawn = multiprocessing.get_context("spawn")
    with (
        Progress(*_COLUMNS, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar,
        ProcessPoolExecutor(max(1, min(jobs, len(chosen))), spawn, _quiet) as pool,
    ):
        task = bar.add_task("sweep", total=len(chosen))
        waiting = {pool.submit(function, case, seed): case.name for case in chosen}
        for done in as_completed(waiting):
            bar.update(task, advance=1, description=waiting[done])
            yield done.result()


def _quiet() -> None:
    """A worker has one thread, and nothing to say but its outcomes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
