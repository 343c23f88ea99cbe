"""`abliterate plan`."""

from typing import Any

import click

from abliterate.commands.given import print_plan_as
from abliterate.options import (
    inexact_option,
    json_option,
    model_argument,
    remote_code_option,
    revision_option,
    voice_options,
)
from abliterate.terminal import loading, set_up_logging


@click.command()
@model_argument
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
    print_plan_as(*plan_and_headers(model, given["revision"], trust_remote_code, inexact), as_json)
