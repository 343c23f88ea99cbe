"""The command line: its commands, and its end. Results go to stdout, progress and messages to stderr.

Exit codes: 0 done, 1 failed (bad input, or a certificate that does not hold), 2 wrong usage, 130 interrupted.
"""

import click

from abliterate import __version__
from abliterate.commands.apply import apply
from abliterate.commands.audit import audit
from abliterate.commands.compare import compare
from abliterate.commands.completion import completion
from abliterate.commands.convert import convert
from abliterate.commands.diff import diff
from abliterate.commands.direction import direction
from abliterate.commands.doctor import doctor
from abliterate.commands.evaluate import evaluate
from abliterate.commands.inspect import inspect
from abliterate.commands.patch import patch
from abliterate.commands.plan import plan
from abliterate.commands.push import push
from abliterate.commands.recipes import recipes
from abliterate.commands.verify import verify
from abliterate.terminal import run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="abliterate")
def cli() -> None:
    """Project the refusal direction out of a checkpoint's weights, exactly, and prove it.

    MODEL is a local folder, or a Hub id such as org/name or org/name@revision.
    """


_COMMANDS = (
    apply,
    audit,
    compare,
    completion,
    convert,
    diff,
    direction,
    doctor,
    evaluate,
    inspect,
    patch,
    plan,
    push,
    recipes,
    verify,
)
for _command in _COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Entry point: one line and an exit code for everything that a user can act on."""
    run(cli)
