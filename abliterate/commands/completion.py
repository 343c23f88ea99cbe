"""`abliterate completion`."""

import click
from click.shell_completion import ShellComplete, get_completion_class

PROGRAM = "abliterate"
VARIABLE = "_ABLITERATE_COMPLETE"
"""By which the script asks for words; click derives it from the program's name."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options, recipes and folders.

    \b
    bash  abliterate completion bash > ~/.local/share/bash-completion/completions/abliterate
    zsh   abliterate completion zsh > "${fpath[1]}/_abliterate"
    fish  abliterate completion fish > ~/.config/fish/completions/abliterate.fish

    Or for one session of bash or zsh: eval "$(abliterate completion bash)"
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows every shell of the choice"
    # not kind.source, which for bash starts one to see how old it is
    click.echo(ShellComplete.source(kind(context.find_root().command, {}, PROGRAM, VARIABLE)))
