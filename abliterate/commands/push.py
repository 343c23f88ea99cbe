"""`abliterate push`."""

from pathlib import Path
from typing import Any

import click

from abliterate.options import json_option, private_option, voice_options
from abliterate.progress import Progress
from abliterate.terminal import echo_json, loading, set_up_logging, telling


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@private_option
@click.option("--revision", metavar="BRANCH", help="Push to this branch, made from main where it is missing.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to main.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be pushed; change nothing.")
@json_option
@voice_options
def push(folder: Path, repository: str, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Push DIR, made by `abliterate convert`, to the Hub: in one commit, or not at all.

    A push that was stopped, whatever stopped it, is continued by the same command: what has arrived is not sent again.
    The token is that of `hf auth login`, or HF_TOKEN.
    """
    with loading():
        from abliterate import pushing
        from abliterate.hub.repository import destination

    set_up_logging(given)
    to = destination(repository, given["revision"], given["private"], given["create_pr"])
    progress = Progress(False if given["quiet"] else None)
    with telling("run the same command again to continue"):
        result = pushing.push(folder, to, progress=progress, dry_run=dry_run)
    if as_json:
        echo_json(result.as_dict())
    elif not given["quiet"]:
        click.echo(f"{'dry run: ' if dry_run else ''}{result.summary}")
        if dry_run:
            for name in result.sent:
                click.echo(f"  {name}  {result.files[name]:,} bytes")
        click.echo(result.link)
