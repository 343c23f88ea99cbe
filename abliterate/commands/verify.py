"""`abliterate verify`."""

from pathlib import Path
from typing import Any

import click

from abliterate.commands.given import run_options_from
from abliterate.completing import complete_model
from abliterate.errors import AbliterateError
from abliterate.options import cache_limit_option, json_option, revision_option, run_options, voice_options
from abliterate.terminal import echo_json, loading


@click.command()
@click.argument("checkpoint", shell_complete=complete_model)
@revision_option
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Verify against this direction.  [default: refusal_direction.safetensors in CHECKPOINT]",
)
@click.option("--template", metavar="NAME|FILE", help="Chat template for a model without one.")
@run_options
@cache_limit_option
@json_option
@voice_options
def verify(checkpoint: str, direction: Path | None, as_json: bool, **given: Any) -> None:
    """Measure the certificate of CHECKPOINT again, on its files; exit 1 when it does not hold."""
    with loading():
        from abliterate import verification
        from abliterate.publish.summary import print_certificate
        from abliterate.record import certificate_record

    given["system_prompt"] = None
    result = verification.verify(
        checkpoint, revision=given["revision"], direction=direction, options=run_options_from(given)
    )
    record = certificate_record(result.certificate)
    if as_json:
        files = {"hashed": result.hashed, "mismatches": list(result.mismatches)}
        echo_json({"holds": result.holds, **files, "certificate": record})
    elif not given["quiet"]:
        print_certificate(record, result.mismatches, result.manifest, result.hashed)
    if result.mismatches:
        raise AbliterateError(f"files differ from the manifest: {', '.join(result.mismatches)}")
    if not result.holds:
        raise AbliterateError(f"certificate failed: {result.certificate.failure or result.certificate.claim}")
