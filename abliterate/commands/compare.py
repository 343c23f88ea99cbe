"""`abliterate compare`."""

from pathlib import Path
from typing import Any

import click

from abliterate.commands.given import recipe_from, run_options_from
from abliterate.completing import complete_recipes
from abliterate.options import (
    cache_limit_option,
    inexact_option,
    json_option,
    max_new_tokens_option,
    model_argument,
    prompt_options,
    revision_option,
    run_options,
    voice_options,
)
from abliterate.recipe import list_recipes
from abliterate.terminal import loading, telling_what_is_left


@click.command()
@model_argument
@click.option(
    "--recipes",
    "names",
    metavar="A,B,...",
    help="Recipes to compare, by name or file.  [default: all]",
    shell_complete=complete_recipes,
)
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
@cache_limit_option
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
        recipes = [recipe_from(given | {"recipe": name}) for name in wanted]
        report = compare_recipes(
            model,
            recipes,
            out,
            revision=given["revision"],
            options=run_options_from(given),
            overwrite=overwrite,
            to_convert=to_convert,
        )
    if as_json:
        click.echo(comparison_json(report.comparison), nl=False)
    elif not given["quiet"]:
        print_comparison(report.comparison)
        click.echo(f"wrote {report.folder}" + (f" and {report.converted.folder}" if report.converted else ""))
