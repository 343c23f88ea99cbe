"""`abliterate patch`."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from abliterate.completing import complete_folder, complete_model
from abliterate.options import cache_limit_option, json_option, remote_code_option, revision_option, voice_options
from abliterate.progress import Progress
from abliterate.terminal import echo_json, loading, set_up_logging


@click.command()
@click.argument("base", shell_complete=complete_model)
@click.argument("edited", type=click.Path(path_type=Path, file_okay=False), shell_complete=complete_folder)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Patch to write.",
)
@revision_option
@click.option(
    "--whole", is_flag=True, help="Also keep the candidate grid and the plots to the byte; several times larger."
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@cache_limit_option
@remote_code_option
@json_option
@voice_options
def patch(base: str, edited: Path, out: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Write all that tells EDITED, which `convert` made of BASE, from BASE: some kilobytes.

    `abliterate apply FILE BASE OUT` makes the same files of it again; that is tried here before FILE is written.
    """
    with loading():
        from abliterate.patch.making import make_patch
        from abliterate.publish.patch_view import print_patch

    set_up_logging({**given, "quiet": quiet})
    made = make_patch(
        base,
        edited,
        out,
        revision=given["revision"],
        whole=given["whole"],
        overwrite=given["overwrite"],
        trust_remote_code=given["trust_remote_code"],
        cache_limit=given["cache_limit"],
        progress=Progress(False if quiet else None),
    )
    if as_json:
        echo_json(
            {"file": str(out), "bytes": out.stat().st_size, "sha256": made.sha256, **dataclasses.asdict(made.about)}
        )
    elif not quiet:
        print_patch(made.about, str(out), out.stat().st_size)
