"""`abliterate apply`."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from abliterate.completing import complete_folder, complete_model
from abliterate.options import cache_limit_option, json_option, remote_code_option, revision_option, voice_options
from abliterate.progress import Progress
from abliterate.terminal import echo_json, loading, set_up_logging, telling_what_is_left


@click.command()
@click.argument("patch", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("base", shell_complete=complete_model)
@click.argument("out", type=click.Path(path_type=Path), shell_complete=complete_folder)
@revision_option
@click.option(
    "--overwrite", is_flag=True, help="Replace OUT if it is there, and drop what another command left unfinished."
)
@cache_limit_option
@remote_code_option
@json_option
@voice_options
def apply(patch: Path, base: str, out: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Make the files of a conversion again from its PATCH and its BASE, to the byte, or nothing.

    The base is hashed before and every file after. A run that was stopped is continued by the same command.
    """
    with loading():
        from abliterate.patch.applying import apply_patch
        from abliterate.publish.patch_view import print_applied

    set_up_logging({**given, "quiet": quiet})
    with telling_what_is_left(out):
        done = apply_patch(
            patch,
            base,
            out,
            revision=given["revision"],
            overwrite=given["overwrite"],
            trust_remote_code=given["trust_remote_code"],
            cache_limit=given["cache_limit"],
            progress=Progress(False if quiet else None),
        )
    if as_json:
        files = {name: dataclasses.asdict(record) for name, record in done.files.items()}
        echo_json({"folder": str(done.folder), "patch": done.patch.sha256, "files": files, "redrawn": done.redrawn})
    elif not quiet:
        print_applied(done.patch.about, str(done.folder), done.files, done.redrawn)
