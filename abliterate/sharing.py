"""Stages of several recipes on one model: what they have in common is computed once, and timed for each of them."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from abliterate.recipe import Recipe
from abliterate.stages import Stages

T = TypeVar("T")
EVALUATION = ("evaluation before", "evaluation after", "stream before", "stream after", "calibration")
"""Stages that are no part of making an edit."""


@dataclass
class Shared:
    """Stages of all recipes: what several have in common is computed once, and its time counts for each of them.

    Attributes:
        seconds: by recipe, what its edit took, or would have taken alone.
    """

    inner: Stages
    seconds: dict[str, float] = field(default_factory=dict)
    _made: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def of(self, recipe: Recipe) -> "OfRecipe":
        """The stages of one recipe."""
        self.seconds.setdefault(recipe.name, 0.0)
        return OfRecipe(self, recipe)

    def stage(self, recipe: str, key: str, kind: Any, make: Callable[[], T], counts: bool) -> T:
        """See `Stages`; `counts`: its time is part of the edit's."""
        if key not in self._made:
            start = time.perf_counter()
            value = self.inner.stage(key, kind, make)
            took = time.perf_counter() - start
            self._made[key] = (value, self.inner.stage(f"seconds of {key}", float, lambda: took))
        value, seconds = self._made[key]
        self.seconds[recipe] += seconds if counts else 0.0
        found: T = value
        return found


@dataclass(frozen=True)
class OfRecipe:
    """Keeps what one recipe computes under names that say what it depends on."""

    shared: Shared
    recipe: Recipe

    def stage(self, name: str, kind: Any, make: Callable[[], T]) -> T:
        """See `Stages`."""
        # rounds are within the selection, whose time is counted as a whole
        counts = name not in EVALUATION and not name.startswith(("scores of", "search:"))
        return self.shared.stage(self.recipe.name, f"{name}{self._on(name)}", kind, make, counts)

    def _on(self, name: str) -> str:
        """What tells stages of that name apart that come out differently, short enough for a file's name."""
        direction, own = self.recipe.direction, ""
        if name == "evaluation before":
            own = self.recipe.edit.head
        elif name == "refusal tokens":
            own = str(direction.refusal_tokens)
        elif name.endswith(" means"):
            own = str((direction.filter, direction.positions, direction.mean, direction.winsorize))
        elif name.startswith("scores of"):
            own = str((direction, self.recipe.selection))
        else:
            return f" of {self.recipe.name}"
        return f" ({hashlib.sha256(own.encode()).hexdigest()[:8]})"
