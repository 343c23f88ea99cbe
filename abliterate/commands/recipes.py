"""`abliterate recipes`."""

import click

from abliterate.completing import complete_recipe
from abliterate.options import json_option
from abliterate.recipe import list_recipes, load_recipe, recipe_path
from abliterate.terminal import echo_json


@click.command()
@click.argument("name", required=False, shell_complete=complete_recipe)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes, or show one with its documentation."""
    if name is None:
        known = list_recipes()
        if as_json:
            echo_json({key: recipe.as_dict() for key, recipe in known.items()})
        else:
            click.echo("\n".join(f"{key:<16} {recipe.description}" for key, recipe in known.items()))
        return
    recipe = load_recipe(name)
    if as_json:
        echo_json(recipe.as_dict())
    else:
        click.echo(recipe_path(name).read_text(encoding="utf-8").rstrip())
