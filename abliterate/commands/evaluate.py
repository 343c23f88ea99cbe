"""`abliterate evaluate`."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from abliterate.commands.given import recipe_from, run_options_from
from abliterate.completing import complete_model
from abliterate.options import (
    cache_limit_option,
    json_option,
    judge_option,
    max_new_tokens_option,
    model_argument,
    prompt_options,
    recipe_option,
    revision_option,
    run_options,
    task_options,
    voice_options,
)
from abliterate.terminal import echo_json, loading, telling_what_is_left


@click.command()
@model_argument
@click.option(
    "--baseline",
    metavar="BASE",
    help="Model to compare with (KL, top-1 agreement): folder or Hub id.",
    shell_complete=complete_model,
)
@recipe_option
@revision_option
@prompt_options
@run_options
@cache_limit_option
@max_new_tokens_option
@judge_option
@task_options
@click.option(
    "--save-completions",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the answers to FILE (JSON lines), which is for your eyes: they are kept nowhere else.",
)
@json_option
@voice_options
def evaluate(
    model: str,
    baseline: str | None,
    judge: str | None,
    tasks: tuple[str, ...],
    task_path: Path | None,
    save_completions: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure refusals, over-refusals, loss, and the distance to a baseline, on held-out prompts.

    Every figure comes with its 95 % interval. Refusals are told by phrases in the answer, by its first token, and by a
    judge if you name one.
    """
    with loading():
        from abliterate import measuring
        from abliterate.publish.summary import print_evaluation

    with telling_what_is_left(save_completions) if save_completions else nullcontext():
        report = measuring.evaluate(
            model,
            baseline=baseline,
            revision=given["revision"],
            recipe=recipe_from(given),
            options=run_options_from(given),
            extras=measuring.Extras(judge, tasks, task_path, save_completions),
        )
    if as_json:
        echo_json(dataclasses.asdict(report))
    elif not given["quiet"]:
        print_evaluation(report)
