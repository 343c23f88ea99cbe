"""What commands make of the options that they share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from abliterate.progress import Progress
from abliterate.recipe import Recipe, load_recipe
from abliterate.terminal import echo_json, set_up_logging


def recipe_from(given: Mapping[str, Any]) -> Recipe:
    """The recipe, with what the command line puts in its place."""
    recipe = load_recipe(given["recipe"])
    recipe = recipe.replacing("calibration", harmful=given["harmful"], harmless=given["harmless"])
    recipe = recipe.replacing("calibration", look_alike=given.get("look_alike"))
    return recipe.replacing("selection", exhaustive=True if given.get("exhaustive") else None)


def run_options_from(given: Mapping[str, Any]) -> Any:
    """How to run: a `RunOptions`; messages are set up."""
    from abliterate.subject import RunOptions

    names = ("device", "dtype", "memory", "batch_size", "seed", "trust_remote_code", "template", "system_prompt")
    set_up_logging(given)
    chosen = {name: given[name] for name in names} | {"inexact": given.get("inexact", False)}
    chosen["max_new_tokens"] = given.get("max_new_tokens")
    chosen["cache_limit"] = given.get("cache_limit")
    chosen["hash_files"] = not given.get("no_hash", False)
    return RunOptions(**chosen, progress=Progress(False if given["quiet"] else None))


def print_plan_as(plan: Any, checkpoint: Any, as_json: bool) -> None:
    """Prints a plan as a table, or as JSON."""
    if as_json:
        echo_json(dataclasses.asdict(plan))
        return
    from abliterate.publish.summary import print_plan

    print_plan(plan, checkpoint)
