"""Options that several commands of the command line share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from abliterate.completing import complete_model, complete_recipe
from abliterate.errors import AbliterateError
from abliterate.sizes import parse_memory, parse_size

Command = Callable[..., Any]


def _options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _memory(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    try:
        parse_memory(value)
    except AbliterateError as error:
        raise click.BadParameter(str(error)) from error
    return value


def _size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    try:
        return parse_size(value) if value is not None else None
    except AbliterateError as error:
        raise click.BadParameter(str(error)) from error


def _names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in (value or "").split(",") if name.strip()))
    if value is not None and not names:
        raise click.BadParameter("no task is named")
    return names


model_argument = click.argument("model", shell_complete=complete_model)
revision_option = click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub model.")
recipe_option = click.option(
    "--recipe",
    default="refusal",
    show_default=True,
    metavar="NAME|FILE",
    help="Method; see `abliterate recipes`.",
    shell_complete=complete_recipe,
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
voice_options = _options(
    click.option("-v", "--verbose", is_flag=True, help="Say what is being done."),
    click.option("-q", "--quiet", is_flag=True, help="No progress bars, only errors."),
)
private_option = click.option(
    "--private/--public",
    default=None,
    help="Who sees the repository.  [default: private; one that is public already needs --public]",
)
prompt_options = _options(
    click.option(
        "--harmful",
        metavar="SRC",
        help="FILE[:column] (.txt .json .jsonl .csv .parquet) or hf:dataset[:config[:split[:column]]].",
    ),
    click.option("--harmless", metavar="SRC", help="Harmless prompts, likewise."),
    click.option("--look-alike", metavar="SRC", help="Harmless prompts in the words of harmful ones, likewise."),
    click.option("--system-prompt", metavar="TEXT", help="System prompt before every instruction."),
    click.option(
        "--template", metavar="NAME|FILE", help="For a model without chat template: a built-in name, or a Jinja file."
    ),
)
exhaustive_option = click.option(
    "--exhaustive", is_flag=True, help="Score every candidate on every validation prompt instead of screening."
)
remote_code_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."
)
inexact_option = click.option(
    "--inexact", is_flag=True, help="Also where no direction is exact on the architecture; nothing is certified then."
)
max_new_tokens_option = click.option(
    "--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Of completions.  [default: the recipe's]"
)
cache_limit_option = click.option(
    "--cache-limit",
    metavar="SIZE",
    callback=_size,
    help="Fetch shards of Hub models as they are needed, and have no more than SIZE (100GB) of them on the disk.",
)
judge_option = click.option(
    "--judge",
    metavar="SPEC",
    help="Who also tells refusals. classifier:PATH[#LABEL]: a sequence classification model (folder or Hub id) that "
    "reads the answer. chat:PATH: a chat model, asked for yes or no. http(s)://HOST/v1#MODEL: an OpenAI-compatible "
    "endpoint, to which prompts and answers are sent; its key is read from the variable OPENAI_API_KEY.",
)
task_options = _options(
    click.option(
        "--tasks",
        metavar="NAME,...",
        callback=_names,
        help="Benchmarks of lm-evaluation-harness (mmlu,arc_challenge,...); needs pip install 'abliterate[eval]'.",
    ),
    click.option(
        "--task-path",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        help="Task files (YAML) of your own, which may refer to local data and to Python code that is then run.",
    ),
)
run_options = _options(
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Of calibration and evaluation; certificates always compute in float32.",
    ),
    click.option(
        "--memory",
        default="auto",
        show_default=True,
        metavar="auto|resident|streamed|SIZE",
        callback=_memory,
        help="Weights in memory, or one decoder layer at a time; SIZE (16GB) is what they may take.",
    ),
    click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Prompts a pass.  [default: by device]"),
    click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the split of prompt files."
    ),
    remote_code_option,
)
