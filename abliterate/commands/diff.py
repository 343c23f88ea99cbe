"""`abliterate diff`."""

from pathlib import Path
from typing import Any

import click

from abliterate.completing import complete_model
from abliterate.options import cache_limit_option, json_option, remote_code_option, voice_options
from abliterate.progress import Progress
from abliterate.terminal import echo_json, loading, set_up_logging


@click.command()
@click.argument("base", shell_complete=complete_model)
@click.argument("edited", shell_complete=complete_model)
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Hold the differences against the direction in this file.  [default: refusal_direction.safetensors in EDITED]",
)
@click.option(
    "--save-direction",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the direction that was recovered from the differences, as a file for --direction.",
)
@click.option("--overwrite", is_flag=True, help="Replace the FILE of --save-direction if it is there.")
@cache_limit_option
@remote_code_option
@json_option
@voice_options
def diff(
    base: str,
    edited: str,
    direction: Path | None,
    save_direction: Path | None,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Say what differs between two checkpoints, and what kind of edit that is, whoever made it.

    BASE and EDITED are folders or Hub ids (org/name@revision). Weights are read in blocks, so that memory does not
    grow with the model; nothing is run. Of every tensor that differs: the rank of the difference above what rounding
    of the stored dtypes can do, whether it is a projection of the base's own weights and how strong, and which
    direction of the residual stream it writes along.

    The edit is named, with its evidence: identical; a projection, a partial or reversed one, one that keeps norms, or
    one that differs by layer; a merged LoRA; a fine-tune; quantised or rounded; another vocabulary; another model; or
    unknown.

    Columns of the table: rank above the edge; size of the difference beside the tensor; its largest singular value
    σ1, and the edge, the largest that rounding could have made; the strength of a projection, and the cosine between
    the difference and one (1: it is a projection, 0: it has nothing to do with the base).
    """
    with loading():
        from abliterate.difference_record import difference_record
        from abliterate.differing import diff as compare
        from abliterate.publish.difference_view import print_difference

    set_up_logging(given)
    progress = Progress(False if given["quiet"] else None)
    found = compare(
        base,
        edited,
        direction=direction,
        save_direction=save_direction,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        cache_limit=given["cache_limit"],
        progress=progress,
    )
    if as_json:
        echo_json(difference_record(found))
    elif not given["quiet"]:
        print_difference(difference_record(found))
