"""`abliterate convert`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from abliterate.commands.given import print_plan_as, recipe_from, run_options_from
from abliterate.completing import complete_folder
from abliterate.errors import AbliterateError
from abliterate.options import (
    cache_limit_option,
    exhaustive_option,
    inexact_option,
    json_option,
    max_new_tokens_option,
    model_argument,
    private_option,
    prompt_options,
    recipe_option,
    revision_option,
    run_options,
    voice_options,
)
from abliterate.terminal import echo_json, loading, telling_what_is_left


@click.command()
@model_argument
@click.argument("out", type=click.Path(path_type=Path), shell_complete=complete_folder)
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
@cache_limit_option
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; write nothing.")
@click.option(
    "--overwrite", is_flag=True, help="Replace OUT if it is there, and drop what another command left unfinished."
)
@inexact_option
@click.option(
    "--adapter",
    type=click.Choice(["peft"]),
    help="Make OUT a LoRA adapter in PEFT's format in place of a checkpoint.",
)
@click.option(
    "--patch",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write kilobytes from which `abliterate apply` makes OUT again.",
)
@click.option("--no-evaluate", is_flag=True, help="Leave out the evaluation before and after.")
@max_new_tokens_option
@click.option("--no-hash", is_flag=True, help="Leave out sha256 of the weights; `verify` cannot compare them then.")
@click.option(
    "--push-to",
    metavar="ORG/NAME[@BRANCH]",
    help="Push the result to this repository of the Hub: shards as they are finished, one commit when it holds.",
)
@click.option(
    "--drop-shards",
    is_flag=True,
    help="With --push-to and --cache-limit: remove each shard once it is on a branch there, and read it back to be "
    "proved. OUT then holds all but the weights; neither the base nor the result is ever here whole.",
)
@private_option
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
        from abliterate.hub.repository import destination

    push_to, private = given["push_to"], given["private"]
    if push_to is None and private is not None:
        raise click.UsageError("--private and --public go with --push-to")
    _check_dropping(given)
    common: dict[str, Any] = {
        "recipe": recipe_from(given),
        "revision": given["revision"],
        "direction": given["direction"],
        "options": run_options_from(given),
        "evaluate": not no_evaluate,
        "push_to": destination(push_to, private=private) if push_to is not None else None,
        "drop_shards": given["drop_shards"],
    }
    patch = given["patch"]
    if given["adapter"]:
        _adapt(model, out, as_json, {**given, "dry_run": dry_run, "overwrite": overwrite}, common)
        return
    if patch is not None and given["no_hash"]:
        raise click.UsageError("--patch needs the hashes that --no-hash leaves out")
    if dry_run:
        would = dryrun.dry_run(model, out, overwrite=overwrite, **common)
        print_plan_as(would.plan, would.checkpoint, as_json)
        if not as_json:
            click.echo(f"dry run: {would.summary}; nothing was written")
        return
    result = conversion.convert(model, out, overwrite=overwrite, patch=patch, **common)
    if as_json:
        click.echo(conversion.to_json(result))
    elif not given["quiet"]:
        from abliterate.publish.summary import print_conversion

        print_conversion(result.manifest, str(result.folder))
        if result.weights:
            click.echo(f"{result.folder} holds everything but the weights; they are on the Hub as {result.weights}")
        if result.pushed:
            click.echo(f"{result.pushed.summary}\n{result.pushed.link}")
    if not result.holds:
        raise AbliterateError(f"certificate failed: {result.certificate.failure}; see {result.folder}")


def _check_dropping(given: Mapping[str, Any]) -> None:
    if not given["drop_shards"]:
        return
    for option in (name for name in ("push_to", "cache_limit") if given[name] is None):
        raise click.UsageError(f"--drop-shards needs --{option.replace('_', '-')}")
    if given["no_hash"]:
        raise click.UsageError("--drop-shards knows shards again by the hashes that --no-hash leaves out")


def _adapt(model: str, out: Path, as_json: bool, given: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    others = ("patch", "push_to", "drop_shards")
    for option in (f"--{name.replace('_', '-')}" for name in others if given[name]):
        raise click.UsageError(f"{option} does not go with --adapter")
    with loading():
        from abliterate import adapting, dryrun
        from abliterate.publish.adapter_view import print_adapter, print_adapter_plan

    wanted = {key: common[key] for key in ("recipe", "revision", "direction", "options", "evaluate")}
    wanted["overwrite"] = given["overwrite"]
    if given["dry_run"]:
        would = dryrun.adapter_dry_run(model, out, **wanted)
        if as_json:
            echo_json(asdict(would.outline))
        else:
            print_adapter_plan(would.outline, would.summary)
        return
    result = adapting.adapt(model, out, **wanted)
    if as_json:
        echo_json({"folder": str(result.folder), **result.manifest})
    elif not given["quiet"]:
        print_adapter(result.manifest, str(result.folder))
