"""`abliterate inspect`."""

from typing import Any

import click

from abliterate.completing import complete_model
from abliterate.errors import AbliterateError
from abliterate.options import cache_limit_option, json_option, remote_code_option, revision_option, voice_options
from abliterate.progress import Progress
from abliterate.terminal import echo_json, loading, set_up_logging


@click.command()
@click.argument("checkpoint", shell_complete=complete_model)
@revision_option
@click.option(
    "--base",
    metavar="BASE",
    shell_complete=complete_model,
    help="The base that it is said to be made from, to compare too: folder or Hub id.",
)
@cache_limit_option
@remote_code_option
@json_option
@voice_options
def inspect(
    checkpoint: str, revision: str | None, base: str | None, trust_remote_code: bool, as_json: bool, **given: Any
) -> None:
    """Say what CHECKPOINT claims of itself, and whether its files bear that out; exit 1 when they do not.

    Claims are those of its manifest, abliteration.json: base, recipe, direction, certificate, evaluation. They are held
    against headers, config.json, hashes of the shards and of the direction, and what the stored writers have along the
    direction. No model is run: `abliterate verify` does that, and measures the stream too. A checkpoint without a
    manifest claims nothing and is described from its headers alone.
    """
    with loading():
        from abliterate.inspecting import inspect as look
        from abliterate.publish.inspection_view import inspection_record, print_inspection

    set_up_logging(given)
    progress = Progress(False if given["quiet"] else None)
    found = look(
        checkpoint,
        revision=revision,
        base=base,
        trust_remote_code=trust_remote_code,
        cache_limit=given["cache_limit"],
        progress=progress,
    )
    if as_json:
        echo_json(inspection_record(found))
    elif not given["quiet"]:
        print_inspection(found)
    if not found.holds:
        wrong = [check.claim for check in found.checks if check.holds is False]
        raise AbliterateError(f"{found.name} does not bear out its manifest: {', '.join(wrong)}")
