"""What every command of the command line has in common: messages, logging, errors, exit codes.

Exit codes: 0 done, 1 failed (bad input, or a certificate that does not hold), 2 wrong usage, 130 interrupted.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from abliterate.checkpoint.workfolder import WorkFolder
from abliterate.errors import AbliterateError, out_of_memory

log = logging.getLogger("abliterate")

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    # torch's sums in fp32 else come out differently when the machine is busy: MKL then takes fewer threads
    "MKL_CBWR": "AUTO,STRICT",
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
}
"""What libraries read when they are loaded, unless the user has set it: the same command has to give the same bytes."""


class _Stopped(KeyboardInterrupt):
    """Ctrl-C, of a run that leaves something; the message says what."""


@contextmanager
def telling_what_is_left(out: Path) -> Iterator[None]:
    """Ctrl-C ends in another message where the same command has something to go on from, or OUT was done by then."""
    before = _identity(out)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        with suppress(OSError, ValueError, RuntimeError):  # of an OUT that cannot be
            if WorkFolder.of(out.resolve()).unfinished:
                raise _Stopped("run the same command again to continue") from interrupt
        if _identity(out) not in (None, before):
            raise _Stopped(f"{out} was done by then") from interrupt
        raise


@contextmanager
def telling(words: str) -> Iterator[None]:
    """Ctrl-C ends in that message."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise _Stopped(words) from interrupt


def _identity(path: Path) -> tuple[int, int] | None:
    """Which folder that is; None where there is none."""
    with suppress(OSError, ValueError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


@contextmanager
def loading() -> Iterator[None]:
    """Ctrl-C waits until libraries are loaded: halfway, some swallow it and others end the process their own way."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def set_up_logging(given: Mapping[str, Any]) -> None:
    """Messages on stderr: with `verbose` all, with `quiet` errors alone."""
    level = logging.INFO if given["verbose"] else logging.ERROR if given["quiet"] else logging.WARNING
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    log.setLevel(level)
    if given["quiet"] and given["verbose"]:
        raise click.UsageError("-q and -v do not go together")


def echo_json(value: Any) -> None:
    """Prints a result for scripts."""
    from abliterate.publish.manifest import plain_values

    click.echo(json.dumps(plain_values(value, "the result"), indent=2, ensure_ascii=False, allow_nan=False))


def _complain(message: str) -> None:
    """One line, whatever names and values are in it."""
    click.echo(f"error: {' '.join(message.split())}", err=True)


def run(cli: click.Group) -> NoReturn:
    """Runs a command line; ends the process with one line and an exit code for everything that a user can act on."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        code = cli(standalone_mode=False)
        sys.exit(code or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        left = error.__cause__ if isinstance(error.__cause__, _Stopped) else "nothing was written"
        click.echo(f"interrupted: {left}", err=True)
        sys.exit(130)
    except AbliterateError as error:
        _complain(str(error))
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        _complain("out of memory; --memory streamed, a smaller --batch-size or --dtype bfloat16 needs less")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _complain(f"{place}{error.strerror or error}")
        sys.exit(1)
