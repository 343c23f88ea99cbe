"""`abliterate doctor`."""

import click

from abliterate.errors import AbliterateError
from abliterate.options import json_option
from abliterate.terminal import echo_json, loading


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Print what a bug report needs: versions, devices, memory, caches, and what is wrong; exit 1 if something is.

    Nothing is sent or fetched. The output holds no token, and no name of yours: paths start at ~.
    """
    with loading():
        from abliterate.doctor.examine import examine
        from abliterate.publish.doctor_view import print_doctor

        found = examine()
    if as_json:
        echo_json(found.as_dict())
    else:
        print_doctor(found)
    if found.broken:
        first = found.findings[0]
        raise AbliterateError(f"{first.what}; {first.hint}")
