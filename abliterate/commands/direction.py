"""`abliterate direction`."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from abliterate.commands.given import recipe_from, run_options_from
from abliterate.options import (
    cache_limit_option,
    exhaustive_option,
    json_option,
    model_argument,
    prompt_options,
    recipe_option,
    revision_option,
    run_options,
    voice_options,
)
from abliterate.terminal import echo_json, loading


@click.command()
@model_argument
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
@cache_limit_option
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

    recipe = recipe_from(given)
    found = find_direction(
        model, recipe=recipe, revision=given["revision"], options=run_options_from(given), out=out, overwrite=overwrite
    )
    record = selection_record(found.selection, dataclasses.asdict(thresholds_of(recipe.selection)))
    if as_json:
        echo_json({"file": str(out), "sha256": found.sha256, "selection": record})
    elif not given["quiet"]:
        print_selection(record)
        click.echo(f"wrote {out}")
