"""What a shell completes: recipes, folders, and models that the Hub's cache holds. Loads no library.

Files and folders come first: the script for bash forgets all that came before them.
"""

import os
from pathlib import Path

from click import Context, Parameter
from click.shell_completion import CompletionItem

from abliterate.recipe import recipe_names

_CACHED = "models--"


def complete_recipe(_context: Context, _parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Shipped recipes; files where none starts so."""
    return [CompletionItem(incomplete, type="file"), *map(CompletionItem, _starting(recipe_names(), incomplete))]


def complete_recipes(_context: Context, _parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """The last of several recipes with commas between them; those that are named already are left out."""
    before, comma, last = incomplete.rpartition(",")
    named = before.split(",")
    return [CompletionItem(f"{before}{comma}{name}") for name in _starting(recipe_names(), last) if name not in named]


def complete_model(_context: Context, _parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Hub ids of what was downloaded before; folders where none starts so."""
    return [CompletionItem(incomplete, type="dir"), *map(CompletionItem, _starting(cached_models(), incomplete))]


def complete_folder(_context: Context, _parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders."""
    return [CompletionItem(incomplete, type="dir")]


def cached_models() -> list[str]:
    """Hub ids in the client's cache, found by the names of its folders."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    try:
        folders = sorted(path.name for path in cache.expanduser().iterdir())
    except (OSError, RuntimeError):
        return []
    return [name.removeprefix(_CACHED).replace("--", "/") for name in folders if name.startswith(_CACHED)]


def _starting(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
