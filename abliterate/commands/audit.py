"""`abliterate audit`."""

from pathlib import Path
from typing import Any

import click

from abliterate.commands.given import recipe_from, run_options_from
from abliterate.completing import complete_folder
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
from abliterate.terminal import echo_json, loading, telling_what_is_left


@click.command()
@model_argument
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the report.",
    shell_complete=complete_folder,
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
@cache_limit_option
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

        common: dict[str, Any] = {"recipe": recipe_from(given), "revision": given["revision"]}
        size = AuditSize(prompts, directions)
        report = audit_model(model, out, options=run_options_from(given), size=size, overwrite=overwrite, **common)
    if as_json:
        echo_json({"folder": str(report.folder), **report.record})
    elif not given["quiet"]:
        print_audit(report.record, str(report.folder))
