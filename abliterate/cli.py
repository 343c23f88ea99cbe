"""The command line: parse, call, print. Results go to stdout, progress and messages to stderr.

Exit codes: 0 done, 1 failed (bad input, or a certificate that does not hold), 2 wrong usage, 130 interrupted.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from abliterate import __version__
from abliterate.checkpoint.workfolder import WorkFolder
from abliterate.errors import AbliterateError, out_of_memory
from abliterate.options import (
    exhaustive_option,
    inexact_option,
    json_option,
    prompt_options,
    recipe_option,
    remote_code_option,
    revision_option,
    run_options,
    voice_options,
)
from abliterate.progress import Progress
from abliterate.recipe import Recipe, list_recipes, load_recipe, recipe_path

log = logging.getLogger("abliterate")

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    # torch's sums in fp32 else come out differently when the machine is busy: MKL then takes fewer threads
    "MKL_CBWR": "AUTO,STRICT",
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
}
"""What libraries read when they are loaded, unless the user has set it: the same command has to give the same bytes."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="abliterate")
def cli() -> None:
    """Project the refusal direction out of a checkpoint's weights, exactly, and prove it.

    MODEL is a local folder, or a Hub id such as org/name or org/name@revision.
    """


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@recipe_option
@revision_option
@prompt_options
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Use the direction in this file (tensor `direction` [hidden]); nothing is calibrated.",
)
@exhaustive_option
@run_options
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; write nothing.")
@click.option(
    "--overwrite", is_flag=True, help="Replace OUT if it is there, and drop what another command left unfinished."
)
@inexact_option
@click.option("--no-evaluate", is_flag=True, help="Leave out the evaluation before and after.")
@json_option
@voice_options
def convert(
    model: str, out: Path, dry_run: bool, overwrite: bool, no_evaluate: bool, as_json: bool, **given: Any
) -> None:
    """Find the refusal direction of MODEL, project it out of its weights, write OUT, and prove the result.

    A run that was stopped, whatever stopped it, is continued by the same command.
    """
    with _telling_what_is_left(out):
        _convert(model, out, dry_run, overwrite, no_evaluate, as_json, given)


def _convert(
    model: str, out: Path, dry_run: bool, overwrite: bool, no_evaluate: bool, as_json: bool, given: Mapping[str, Any]
) -> None:
    with _loading():
        from abliterate import conversion, dryrun

    common: dict[str, Any] = {
        "recipe": _recipe(given),
        "revision": given["revision"],
        "direction": given["direction"],
        "options": _run_options(given),
        "evaluate": not no_evaluate,
    }
    if dry_run:
        would = dryrun.dry_run(model, out, overwrite=overwrite, **common)
        _print_plan(would.plan, would.checkpoint, as_json)
        if not as_json:
            click.echo(f"dry run: {would.summary}; nothing was written")
        return
    result = conversion.convert(model, out, overwrite=overwrite, **common)
    if as_json:
        click.echo(conversion.to_json(result))
    elif not given["quiet"]:
        from abliterate.publish.summary import print_conversion

        print_conversion(result.manifest, str(result.folder))
    if not result.holds:
        raise AbliterateError(f"certificate failed: {result.certificate.failure}; see {result.folder}")


@cli.command()
@click.argument("model")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Safetensors file to write.",
)
@recipe_option
@revision_option
@prompt_options
@exhaustive_option
@run_options
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@json_option
@voice_options
def direction(model: str, out: Path, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Find the refusal direction of MODEL only.

    FILE holds `direction` [hidden], the pick; `directions` [positions, layers, hidden], the candidate grid; and the
    grid's `bypass`, `induce` and `kl` scores.
    """
    with _loading():
        from abliterate.find import find_direction, thresholds_of
        from abliterate.publish.summary import print_selection
        from abliterate.record import selection_record

    recipe = _recipe(given)
    found = find_direction(
        model, recipe=recipe, revision=given["revision"], options=_run_options(given), out=out, overwrite=overwrite
    )
    record = selection_record(found.selection, dataclasses.asdict(thresholds_of(recipe.selection)))
    if as_json:
        _echo_json({"file": str(out), "sha256": found.sha256, "selection": record})
    elif not given["quiet"]:
        print_selection(record)
        click.echo(f"wrote {out}")


@cli.command()
@click.argument("model")
@revision_option
@click.option("--entry", is_flag=True, help="Print what the gradient probe finds, as an entry for the table (YAML).")
@inexact_option
@remote_code_option
@json_option
@voice_options
def plan(model: str, entry: bool, inexact: bool, trust_remote_code: bool, as_json: bool, **given: Any) -> None:
    """Show what would be edited, what is kept, and why: every tensor accounted for, from headers alone."""
    with _loading():
        from abliterate.planning import plan_and_headers, probed_text

    _set_up_logging(given)
    if entry:
        click.echo(probed_text(model, given["revision"], trust_remote_code), nl=False)
        return
    _print_plan(*plan_and_headers(model, given["revision"], trust_remote_code, inexact), as_json)


@cli.command()
@click.argument("checkpoint")
@revision_option
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Verify against this direction.  [default: refusal_direction.safetensors in CHECKPOINT]",
)
@click.option("--template", metavar="NAME|FILE", help="Chat template for a model without one.")
@run_options
@json_option
@voice_options
def verify(checkpoint: str, direction: Path | None, as_json: bool, **given: Any) -> None:
    """Measure the certificate of CHECKPOINT again, on its files; exit 1 when it does not hold."""
    with _loading():
        from abliterate import verification
        from abliterate.publish.summary import print_certificate
        from abliterate.record import certificate_record

    given["system_prompt"] = None
    result = verification.verify(
        checkpoint, revision=given["revision"], direction=direction, options=_run_options(given)
    )
    record = certificate_record(result.certificate)
    if as_json:
        _echo_json({"holds": result.holds, "mismatches": list(result.mismatches), "certificate": record})
    elif not given["quiet"]:
        print_certificate(record, result.mismatches, result.manifest)
    if result.mismatches:
        raise AbliterateError(f"files differ from the manifest: {', '.join(result.mismatches)}")
    if not result.holds:
        raise AbliterateError(f"certificate failed: {result.certificate.failure or result.certificate.claim}")


@cli.command()
@click.argument("model")
@click.option("--baseline", metavar="BASE", help="Model to compare with (KL, top-1 agreement): folder or Hub id.")
@recipe_option
@revision_option
@prompt_options
@run_options
@json_option
@voice_options
def evaluate(model: str, baseline: str | None, as_json: bool, **given: Any) -> None:
    """Measure refusals, over-refusals, loss, and the distance to a baseline, on held-out prompts."""
    with _loading():
        from abliterate import measuring
        from abliterate.publish.summary import print_evaluation

    report = measuring.evaluate(
        model, baseline=baseline, revision=given["revision"], recipe=_recipe(given), options=_run_options(given)
    )
    if as_json:
        _echo_json(dataclasses.asdict(report))
    elif not given["quiet"]:
        print_evaluation(report)


@cli.command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes, or show one with its documentation."""
    if name is None:
        known = list_recipes()
        if as_json:
            _echo_json({key: recipe.as_dict() for key, recipe in known.items()})
        else:
            click.echo("\n".join(f"{key:<16} {recipe.description}" for key, recipe in known.items()))
        return
    recipe = load_recipe(name)
    if as_json:
        _echo_json(recipe.as_dict())
    else:
        click.echo(recipe_path(name).read_text(encoding="utf-8").rstrip())


class _Stopped(KeyboardInterrupt):
    """Ctrl-C, of a run that leaves something; the message says what."""


@contextmanager
def _telling_what_is_left(out: Path) -> Iterator[None]:
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


def _identity(path: Path) -> tuple[int, int] | None:
    """Which folder that is; None where there is none."""
    with suppress(OSError, ValueError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


@contextmanager
def _loading() -> Iterator[None]:
    """Ctrl-C waits until libraries are loaded: halfway, some swallow it and others end the process their own way."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _recipe(given: Mapping[str, Any]) -> Recipe:
    recipe = load_recipe(given["recipe"])
    recipe = recipe.replacing("calibration", harmful=given["harmful"], harmless=given["harmless"])
    return recipe.replacing("selection", exhaustive=True if given.get("exhaustive") else None)


def _run_options(given: Mapping[str, Any]) -> Any:
    from abliterate.subject import RunOptions

    names = ("device", "dtype", "batch_size", "seed", "trust_remote_code", "template", "system_prompt")
    _set_up_logging(given)
    chosen = {name: given[name] for name in names} | {"inexact": given.get("inexact", False)}
    return RunOptions(**chosen, progress=Progress(False if given["quiet"] else None))


def _set_up_logging(given: Mapping[str, Any]) -> None:
    level = logging.INFO if given["verbose"] else logging.ERROR if given["quiet"] else logging.WARNING
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    log.setLevel(level)
    if given["quiet"] and given["verbose"]:
        raise click.UsageError("-q and -v do not go together")


def _print_plan(plan: Any, checkpoint: Any, as_json: bool) -> None:
    if as_json:
        _echo_json(dataclasses.asdict(plan))
        return
    from abliterate.publish.summary import print_plan

    print_plan(plan, checkpoint)


def _echo_json(value: Any) -> None:
    from abliterate.publish.manifest import plain_values

    click.echo(json.dumps(plain_values(value, "the result"), indent=2, ensure_ascii=False, allow_nan=False))


def _complain(message: str) -> None:
    """One line, whatever names and values are in it."""
    click.echo(f"error: {' '.join(message.split())}", err=True)


def main() -> None:
    """Entry point: one line and an exit code for everything that a user can act on."""
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
        _complain("out of memory; a smaller --batch-size or --dtype bfloat16 needs less")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _complain(f"{place}{error.strerror or error}")
        sys.exit(1)
