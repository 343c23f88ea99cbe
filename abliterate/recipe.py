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
    look_alike: str = "builtin"
    train: int = field(default=128, metadata=_range(8, 1_000_000))
    validation: int = field(default=32, metadata=_range(2, 100_000))
    test: int = field(default=64, metadata=_range(1, 100_000))
    thinking: Literal["auto", "off", "on"] = "auto"


@dataclass(frozen=True)
class DirectionRecipe:
    """How candidate directions are computed."""

    contrast: Literal["refusal", "false-refusal"] = "refusal"
    filter: bool = True
    refusal_tokens: Literal["auto"] | tuple[str, ...] = "auto"
    positions: Literal["all"] | int = field(default="all", metadata=_range(1, 64))
    mean: Literal["arithmetic", "geometric-median"] = "arithmetic"
    winsorize: float = field(default=1.0, metadata=_range(0.5, 1.0))
    harmless_part: Literal["kept", "removed"] = "kept"
    refine: int = field(default=0, metadata=_range(0, 1000))


@dataclass(frozen=True)
class SelectionRecipe:
    """The rule's thresholds (Arditi et al. 2024, appendix C) and how much of the grid is measured in full."""

    max_layer_fraction: float = field(default=0.8, metadata=_range(0.01, 1.0))
    max_kl: float = field(default=0.1, metadata=_range(0.0, 1e6))
    min_induce: float = field(default=0.0, metadata=_range(-1e6, 1e6))
    strict: bool = False
    exhaustive: bool = False


@dataclass(frozen=True)
class CurveRecipe:
    """Strength over the depth: `peak` at the share `at` of it, falling in a straight line to `floor`, `reach` away."""

    peak: float = field(default=1.0, metadata=_range(-2.0, 2.0))
    at: float = field(default=0.5, metadata=_range(0.0, 1.0))
    floor: float = field(default=1.0, metadata=_range(-2.0, 2.0))
    reach: float = field(default=1.0, metadata=_range(0.01, 2.0))


@dataclass(frozen=True)
class EditRecipe:
    """Which directions, where and how strongly, and what becomes of a head that shares the embedding."""

    head: Literal["untied", "tied"] = "untied"
    directions: Literal["one", "per-layer", "subspace"] = "one"
    count: int = field(default=1, metadata=_range(1, 64))
    span: Literal["candidates", "pairs"] = "candidates"
    strength: float = field(default=1.0, metadata=_range(-2.0, 2.0))
    strengths: Literal["curve", "search"] = "curve"
    attention: CurveRecipe = CurveRecipe()
    mlp: CurveRecipe = CurveRecipe()
    embeddings: Literal["edited", "kept"] = "edited"
    norms: Literal["free", "kept"] = "free"


@dataclass(frozen=True)
class SearchRecipe:
    """How strengths are searched for, where `edit.strengths` is `search`."""

    method: Literal["gradient", "optuna"] = "gradient"
    steps: int = field(default=4, metadata=_range(1, 1000))
    further_steps: int = field(default=20, metadata=_range(0, 1000))
    kl_weights: tuple[float, ...] = field(default=(5.0, 20.0), metadata=_range(0.0, 1e6))
    margin: float = field(default=3.0, metadata=_range(0.0, 100.0))
    trials: int = field(default=24, metadata=_range(1, 100_000))
    max_strength: float = field(default=1.5, metadata=_range(0.01, 2.0))
    directions: bool = True
    refusals: float = field(default=0.05, metadata=_range(0.0, 1.0))


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
    search: SearchRecipe = SearchRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, keys in the order of the schema."""
        plain: dict[str, Any] = dataclasses.asdict(self)
        listed: dict[str, Any] = _listed(plain)
        return listed

    def replacing(self, section: str, **values: Any) -> "Recipe":
        """A copy with values of one section replaced; None leaves a value as it is."""
        given = {key: value for key, value in values.items() if value is not None}
        changed = dataclasses.replace(getattr(self, section), **given)
        return dataclasses.replace(self, **{section: changed})


def _listed(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside the wheel, or at the top of a source tree."""
    package = Path(str(importlib.resources.files("abliterate")))
    shipped = package / "recipes"
    return shipped if shipped.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """The shipped recipes, the default first."""
    return sorted(
        (path.stem for path in recipes_folder().glob("*.yaml")), key=lambda name: (name != Recipe().name, name)
    )


def list_recipes() -> dict[str, Recipe]:
    """The shipped recipes by name, the default first."""
    return {name: read_recipe(recipes_folder() / f"{name}.yaml") for name in recipe_names()}


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
        known = ", ".join(sorted(recipe_names()))
        raise RecipeError(f"no recipe named {name_or_file}; shipped recipes: {known}; a file needs its .yaml ending")
    return shipped


def recipe_word(recipe: Recipe) -> str:
    """What `--recipe` takes for this method: the shipped name, or the name of a file that the user has to bring."""
    shipped = list_recipes().get(recipe.name)
    if shipped is None:
        return f"{recipe.name}.yaml"
    # the command line has options of its own for these
    sources = {name: getattr(recipe.calibration, name) for name in ("harmful", "harmless", "look_alike")}
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
    content = _content(path)
    whole = _extended(content, path, ())
    built: Recipe = _build(Recipe, whole, str(path), "")
    _check(built, path)
    return built if "name" in content else dataclasses.replace(built, name=path.stem)


def _extended(content: Mapping[str, Any], path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The content with what it `extends` beneath it: a shipped recipe by name, or a file beside it."""
    own = {key: value for key, value in content.items() if key != "extends"}
    if "extends" not in content:
        return own
    name, here = content["extends"], path.resolve()
    if not isinstance(name, str) or here in seen:
        raise RecipeError(f"{path}: extends is {name!r}; allowed: another recipe's name, or a .yaml file beside it")
    beneath = path.parent / name if Path(name).suffix in (".yaml", ".yml") else recipe_path(name)
    base = _extended(_content(beneath), beneath, (*seen, here))
    # What says which recipe it is does not pass on.
    return _laid_over({key: base[key] for key in base if key not in ("name", "description")}, own)


def _laid_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`, section by section."""
    both = {k for k in own if isinstance(own[k], Mapping) and isinstance(base.get(k), Mapping)}
    return {**base, **own, **{key: _laid_over(base[key], own[key]) for key in both}}


def _check(recipe: Recipe, path: Path) -> None:
    """What keys say together.

    Raises:
        RecipeError: they do not fit.
    """
    edit = recipe.edit
    if edit.strength == 0:
        raise RecipeError(f"{path}: edit.strength is 0, so that nothing would be edited")
    if edit.directions == "subspace" and edit.count < 2:
        raise RecipeError(f"{path}: edit.directions is subspace: say with edit.count how many, from 2 on")
    if edit.directions != "subspace" and edit.count != 1:
        raise RecipeError(f"{path}: edit.count is {edit.count}; it is for edit.directions: subspace")
    if edit.strengths == "search" and edit.directions != "per-layer":
        raise RecipeError(f"{path}: edit.strengths is search, which needs edit.directions: per-layer")
    if recipe.direction.contrast == "false-refusal" and edit.directions != "one":
        raise RecipeError(f"{path}: direction.contrast is false-refusal, which needs edit.directions: one")
    if recipe.direction.refine and recipe.direction.contrast != "false-refusal":
        raise RecipeError(f"{path}: direction.refine is {recipe.direction.refine}; it is for contrast: false-refusal")


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, Mapping):
        raise RecipeError(f"{path}: a recipe is a YAML mapping")
    return content


def _build(kind: type[Any], content: Any, where: str, prefix: str) -> Any:
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where}: {prefix.rstrip('.')} must be a mapping")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            known = ["extends", *fields] if kind is Recipe else fields
            raise RecipeError(f"{where}: unknown key {prefix}{key}; allowed: {', '.join(known)}")
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
        for number in converted if isinstance(converted, tuple) else (converted,):
            if limits and isinstance(number, int | float) and not limits[0] <= number <= limits[1]:
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
    if typing.get_origin(option) is tuple and typing.get_args(option)[0] is float:
        numbers = isinstance(value, list) and value != [] and all(_accept(float, item)[0] for item in value)
        return numbers, tuple(map(float, value)) if numbers else value
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
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is float:
        return "a list of numbers"
    names = {bool: "true, false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, "a list of words")
