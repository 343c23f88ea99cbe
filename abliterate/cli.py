"""The command line: parse, call, print. Results go to stdout, progress and messages to stderr.

Exit codes: 0 done, 1 failed (bad input, or a certificate that does not hold), 2 wrong usage, 130 interrupted.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from abliterate import __version__
from abliterate.errors import AbliterateError
from abliterate.options import (
    exhaustive_option,
    inexact_option,
    json_option,
    judge_option,
    max_new_tokens_option,
    prompt_options,
    recipe_option,
    remote_code_option,
    revision_option,
    run_options,
    task_options,
    voice_options,
)
from abliterate.progress import Progress
from abliterate.recipe import Recipe, list_recipes, load_recipe, recipe_path
from abliterate.terminal import echo_json, loading, run, set_up_logging, telling_what_is_left


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
@max_new_tokens_option
@click.option("--no-hash", is_flag=True, help="Leave out sha256 of the weights; `verify` cannot compare them then.")
@json_option
@voice_options
def convert(
    model: str, out: Path, dry_run: bool, overwrite: bool, no_evaluate: bool, as_json: bool, **given: Any
) -> None:
    """Find the refusal direction of MODEL, project it out of its weights, write OUT, and prove the result.

    A run that was stopped, whatever stopped it, is continued by the same command.
    """
    with telling_what_is_left(out):
        _convert(model, out, dry_run, overwrite, no_evaluate, as_json, given)


def _convert(
    model: str, out: Path, dry_run: bool, overwrite: bool, no_evaluate: bool, as_json: bool, given: Mapping[str, Any]
) -> None:
    with loading():
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
    with loading():
        from abliterate.find import find_direction
        from abliterate.picking import thresholds_of
        from abliterate.publish.summary import print_selection
        from abliterate.record import selection_record

    recipe = _recipe(given)
    found = find_direction(
        model, recipe=recipe, revision=given["revision"], options=_run_options(given), out=out, overwrite=overwrite
    )
    record = selection_record(found.selection, dataclasses.asdict(thresholds_of(recipe.selection)))
    if as_json:
        echo_json({"file": str(out), "sha256": found.sha256, "selection": record})
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
    with loading():
        from abliterate.planning import plan_and_headers, probed_text

    set_up_logging(given)
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
    with loading():
        from abliterate import verification
        from abliterate.publish.summary import print_certificate
        from abliterate.record import certificate_record

    given["system_prompt"] = None
    result = verification.verify(
        checkpoint, revision=given["revision"], direction=direction, options=_run_options(given)
    )
    record = certificate_record(result.certificate)
    if as_json:
        files = {"hashed": result.hashed, "mismatches": list(result.mismatches)}
        echo_json({"holds": result.holds, **files, "certificate": record})
    elif not given["quiet"]:
        print_certificate(record, result.mismatches, result.manifest, result.hashed)
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
@max_new_tokens_option
@judge_option
@task_options
@click.option(
    "--save-completions",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the answers to FILE (JSON lines), which is for your eyes: they are kept nowhere else.",
)
@json_option
@voice_options
def evaluate(
    model: str,
    baseline: str | None,
    judge: str | None,
    tasks: tuple[str, ...],
    task_path: Path | None,
    save_completions: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure refusals, over-refusals, loss, and the distance to a baseline, on held-out prompts.

    Every figure comes with its 95 % interval. Refusals are told by phrases in the answer, by its first token, and by a
    judge if you name one.
    """
    with loading():
        from abliterate import measuring
        from abliterate.publish.summary import print_evaluation

    report = measuring.evaluate(
        model,
        baseline=baseline,
        revision=given["revision"],
        recipe=_recipe(given),
        options=_run_options(given),
        extras=measuring.Extras(judge, tasks, task_path, save_completions),
    )
    if as_json:
        echo_json(dataclasses.asdict(report))
    elif not given["quiet"]:
        print_evaluation(report)


@cli.command()
@click.argument("model")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the report.",
)
@recipe_option
@revision_option
@prompt_options
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Of each validation set, for the map of all positions and layers, and for windows of layers.",
)
@click.option(
    "--directions",
    type=click.IntRange(min=1, max=64),
    default=8,
    show_default=True,
    metavar="K",
    help="Most directions that are removed together.",
)
@exhaustive_option
@run_options
@click.option("--overwrite", is_flag=True, help="Replace DIR if it is there, and drop what was left unfinished.")
@json_option
@voice_options
def audit(model: str, out: Path, prompts: int, directions: int, overwrite: bool, as_json: bool, **given: Any) -> None:
    """Report how concentrated refusal is in MODEL: by position and layer, number of directions, and strength.

    DIR gets audit.html, audit.json and plots. No weights are written. A run that was stopped, whatever stopped it, is
    continued by the same command.
    """
    with telling_what_is_left(out):
        with loading():
            from abliterate.audit.study import AuditSize
            from abliterate.auditing import audit_model
            from abliterate.publish.audit_view import print_audit

        common: dict[str, Any] = {"recipe": _recipe(given), "revision": given["revision"]}
        size = AuditSize(prompts, directions)
        report = audit_model(model, out, options=_run_options(given), size=size, overwrite=overwrite, **common)
    if as_json:
        echo_json({"folder": str(report.folder), **report.record})
    elif not given["quiet"]:
        print_audit(report.record, str(report.folder))


@cli.command()
@click.argument("model")
@click.option("--recipes", "names", metavar="A,B,...", help="Recipes to compare, by name or file.  [default: all]")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder to make.",
)
@click.option("--convert", "to_convert", metavar="best|NAME", help="Convert with that recipe, into a folder in DIR.")
@revision_option
@prompt_options
@run_options
@click.option("--overwrite", is_flag=True, help="Replace DIR if it is there.")
@inexact_option
@max_new_tokens_option
@json_option
@voice_options
def compare(
    model: str, names: str | None, out: Path, to_convert: str | None, overwrite: bool, as_json: bool, **given: Any
) -> None:
    """Apply several recipes to MODEL and measure each on its stored weights: table, Pareto plot, one page.

    DIR gets comparison.html, comparison.json and pareto.png; edited weights are removed again. A run that was stopped
    is continued by the same command.
    """
    with telling_what_is_left(out):
        with loading():
            from abliterate.comparing import compare as compare_recipes
            from abliterate.publish.comparison_view import comparison_json, print_comparison

        wanted = [name.strip() for name in names.split(",")] if names else list(list_recipes())
        recipes = [_recipe(given | {"recipe": name}) for name in wanted]
        report = compare_recipes(
            model,
            recipes,
            out,
            revision=given["revision"],
            options=_run_options(given),
            overwrite=overwrite,
            to_convert=to_convert,
        )
    if as_json:
        click.echo(comparison_json(report.comparison), nl=False)
    elif not given["quiet"]:
        print_comparison(report.comparison)
        click.echo(f"wrote {report.folder}" + (f" and {report.converted.folder}" if report.converted else ""))


@cli.command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes, or show one with its documentation."""
    if name is None:
        known = list_recipes()
        if as_json:
            echo_json({key: recipe.as_dict() for key, recipe in known.items()})
        else:
            click.echo("\n".join(f"{key:<16} {recipe.description}" for key, recipe in known.items()))
        return
    recipe = load_recipe(name)
    if as_json:
        echo_json(recipe.as_dict())
    else:
        click.echo(recipe_path(name).read_text(encoding="utf-8").rstrip())


def _recipe(given: Mapping[str, Any]) -> Recipe:
    recipe = load_recipe(given["recipe"])
    recipe = recipe.replacing("calibration", harmful=given["harmful"], harmless=given["harmless"])
    recipe = recipe.replacing("calibration", look_alike=given.get("look_alike"))
    return recipe.replacing("selection", exhaustive=True if given.get("exhaustive") else None)


def _run_options(given: Mapping[str, Any]) -> Any:
    from abliterate.subject import RunOptions

    names = ("device", "dtype", "memory", "batch_size", "seed", "trust_remote_code", "template", "system_prompt")
    set_up_logging(given)
    chosen = {name: given[name] for name in names} | {"inexact": given.get("inexact", False)}
    chosen["max_new_tokens"] = given.get("max_new_tokens")
    chosen["hash_files"] = not given.get("no_hash", False)
    return RunOptions(**chosen, progress=Progress(False if given["quiet"] else None))


def _print_plan(plan: Any, checkpoint: Any, as_json: bool) -> None:
    if as_json:
        echo_json(dataclasses.asdict(plan))
        return
    from abliterate.publish.summary import print_plan

    print_plan(plan, checkpoint)


def main() -> None:
    """Entry point: one line and an exit code for everything that a user can act on."""
    run(cli)
