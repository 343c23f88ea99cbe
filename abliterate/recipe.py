"""Recipes: what to find and how to edit, as strictly read YAML."""

import dataclasses
import importlib.resources
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from abliterate.errors import RecipeError


def _range(low: float, high: float) -> dict[str, tuple[float, float]]:
    return {"range": (low, high)}


@dataclass(frozen=True)
class CalibrationRecipe:
    """Which prompts, and in which mode a thinking model answers them."""

    harmful: str = "builtin"
    harmless: str = "builtin"
    train: int = field(default=128, metadata=_range(8, 1_000_000))
    validation: int = field(default=32, metadata=_range(2, 100_000))
    test: int = field(default=64, metadata=_range(1, 100_000))
    thinking: Literal["auto", "off", "on"] = "auto"


@dataclass(frozen=True)
class DirectionRecipe:
    """How candidate directions are computed."""

    filter: bool = True
    refusal_tokens: Literal["auto"] | tuple[str, ...] = "auto"
    positions: Literal["all"] | int = field(default="all", metadata=_range(1, 64))


@dataclass(frozen=True)
class SelectionRecipe:
    """The rule's thresholds (Arditi et al. 2024, appendix C) and how much of the grid is measured in full."""

    max_layer_fraction: float = field(default=0.8, metadata=_range(0.01, 1.0))
    max_kl: float = field(default=0.1, metadata=_range(0.0, 1e6))
    min_induce: float = field(default=0.0, metadata=_range(-1e6, 1e6))
    strict: bool = False
    exhaustive: bool = False


@dataclass(frozen=True)
class EditRecipe:
    """How strongly, and what becomes of a head that shares the embedding."""

    head: Literal["untied", "tied"] = "untied"
    strength: float = field(default=1.0, metadata=_range(0.01, 2.0))


@dataclass(frozen=True)
class EvaluationRecipe:
    """How the result is measured."""

    max_new_tokens: int = field(default=48, metadata=_range(1, 4096))
    kl_tokens: int = field(default=16, metadata=_range(0, 4096))


@dataclass(frozen=True)
class Recipe:
    """One method, with every value that it leaves open."""

    name: str = "refusal"
    description: str = ""
    calibration: CalibrationRecipe = CalibrationRecipe()
    direction: DirectionRecipe = DirectionRecipe()
    selection: SelectionRecipe = SelectionRecipe()
    edit: EditRecipe = EditRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, keys in the order of the schema."""
        plain: dict[str, Any] = dataclasses.asdict(self)
        words = plain["direction"]["refusal_tokens"]
        plain["direction"]["refusal_tokens"] = words if isinstance(words, str) else list(words)
        return plain

    def replacing(self, section: str, **values: Any) -> "Recipe":
        """A copy with values of one section replaced; None leaves a value as it is."""
        given = {key: value for key, value in values.items() if value is not None}
        changed = dataclasses.replace(getattr(self, section), **given)
        return dataclasses.replace(self, **{section: changed})


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside the wheel, or at the top of a source tree."""
    package = Path(str(importlib.resources.files("abliterate")))
    shipped = package / "recipes"
    return shipped if shipped.is_dir() else package.parent / "recipes"


def list_recipes() -> dict[str, Recipe]:
    """The shipped recipes by name."""
    return {path.stem: read_recipe(path) for path in sorted(recipes_folder().glob("*.yaml"))}


def recipe_path(name_or_file: str) -> Path:
    """The file of a shipped recipe, or the user's own.

    Raises:
        RecipeError: there is neither.
    """
    shipped = recipes_folder() / f"{name_or_file}.yaml"
    if Path(name_or_file).suffix in (".yaml", ".yml") or "/" in name_or_file:
        if Path(name_or_file).is_file():
            return Path(name_or_file)
        raise RecipeError(f"no recipe file {name_or_file}")
    if not shipped.is_file():
        known = ", ".join(path.stem for path in sorted(recipes_folder().glob("*.yaml")))
        raise RecipeError(f"no recipe named {name_or_file}; shipped recipes: {known}; a file needs its .yaml ending")
    return shipped


def recipe_word(recipe: Recipe) -> str:
    """What `--recipe` takes for this method: the shipped name, or the name of a file that the user has to bring."""
    shipped = list_recipes().get(recipe.name)
    if shipped is None:
        return f"{recipe.name}.yaml"
    # the command line has options of its own for these
    sources = {"harmful": recipe.calibration.harmful, "harmless": recipe.calibration.harmless}
    alike = shipped.replacing("calibration", **sources).replacing("selection", exhaustive=recipe.selection.exhaustive)
    return recipe.name if alike == recipe else f"{recipe.name}.yaml"


def load_recipe(name_or_file: str) -> Recipe:
    """A shipped recipe by name, or a file.

    Raises:
        RecipeError: not found, not YAML, an unknown key, or a value that is not allowed.
    """
    return read_recipe(recipe_path(name_or_file))


def read_recipe(path: Path) -> Recipe:
    """Reads and checks one file; see `load_recipe`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, Mapping):
        raise RecipeError(f"{path}: a recipe is a YAML mapping")
    built: Recipe = _build(Recipe, content, str(path), "")
    return built if "name" in content else dataclasses.replace(built, name=path.stem)


def _build(kind: type[Any], content: Any, where: str, prefix: str) -> Any:
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where}: {prefix.rstrip('.')} must be a mapping")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            raise RecipeError(f"{where}: unknown key {prefix}{key}; allowed: {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(typing.cast(type[Any], hints[key]), value, where, f"{prefix}{key}.")
        else:
            values[key] = _value(hints[key], value, fields[key].metadata.get("range"), f"{where}: {prefix}{key}")
    return kind(**values)


def _value(hint: Any, value: Any, limits: tuple[float, float] | None, where: str) -> Any:
    for option in typing.get_args(hint) if _is_union(hint) else (hint,):
        accepted, converted = _accept(option, value)
        if not accepted:
            continue
        if limits and isinstance(converted, int | float) and not limits[0] <= converted <= limits[1]:
            raise RecipeError(f"{where} is {value}; allowed: {limits[0]:g} to {limits[1]:g}")
        return converted
    raise RecipeError(f"{where} is {value!r}; allowed: {_describe(hint)}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _accept(option: Any, value: Any) -> tuple[bool, Any]:
    if typing.get_origin(option) is Literal:
        # YAML 1.1 reads a bare off and on as booleans.
        value = {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value
        return value in typing.get_args(option), value
    if typing.get_origin(option) is tuple:
        words = isinstance(value, list) and value != [] and all(isinstance(item, str) and item for item in value)
        return words, tuple(value) if words else value
    if option is float:
        return isinstance(value, int | float) and not isinstance(value, bool), value
    return isinstance(value, option) and (option is bool or not isinstance(value, bool)), value


def _describe(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    names = {bool: "true, false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, "a list of words")
