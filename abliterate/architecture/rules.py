"""What an entry of the table says, read: the rule for a tensor's name, and the configs that it does not cover."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from abliterate.architecture.writer import Role

Settings = Mapping[str, Any]
_MOST_NUMBERS = 6
_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?![^.])")


@dataclass(frozen=True)
class StepRule:
    """A `Step`, its tensor named within the same layer (or, outside of layers, below the same prefix)."""

    kind: Literal["scale", "center", "taps"]
    module: str | None = None


@dataclass(frozen=True)
class Rule:
    """What the tensors of one name are.

    Attributes:
        kind: of a writer. `axes`: its hidden axis; two, where checkpoints are released in two layouts, which their
            shapes tell. `dimensions`: how many it has.
        gain: what stands between a writer and the stream, the step nearest to the stream first.
        narrow: it may be narrower than the stream, and then does not write to it.
        module: the name that the table gives.
    """

    role: Role
    reason: str
    module: str
    kind: str = ""
    axes: tuple[int, ...] = ()
    dimensions: int | None = None
    gain: tuple[StepRule, ...] = ()
    narrow: bool = False


@dataclass(frozen=True)
class Rules:
    """Rules by name, for the tensors of one place: a layer, the stem, or what lies outside of the decoder.

    Attributes:
        exact: by the tensor's whole name, numbers as `*`.
        modules: by the name of the module that the tensor is of. `trees`: by the name of anything above it.
    """

    exact: Mapping[str, Rule] = field(default_factory=dict)
    modules: Mapping[str, Rule] = field(default_factory=dict)
    trees: Mapping[str, Rule] = field(default_factory=dict)

    def find(self, name: str) -> Rule | None:
        """The rule for a tensor's name below the place; the most specific one."""
        # A name that has a * itself would pass for a folded one.
        if "*" in name:
            return None
        names = list(_foldings(name))
        modules = [*names, *dict.fromkeys(folded.rpartition(".")[0] for folded in names)]
        # the deepest tree first; of those as deep, the one whose numbers are its own
        above = sorted(
            dict.fromkeys(part for folded in names for part in _above(folded)), key=lambda part: -part.count(".")
        )
        for rules, keys in ((self.exact, names), (self.modules, modules), (self.trees, above)):
            found = next((rules[key] for key in keys if key in rules), None)
            if found is not None:
                return found
        return None


@dataclass(frozen=True)
class Refusal:
    """Configs that the entry does not cover: a key's value (any at all, where `given`), and why.

    Attributes:
        inexact: they can be converted, though not exactly.
    """

    key: str
    why: str
    value: Any = None
    given: bool = False
    inexact: bool = False

    def applies(self, settings: Settings) -> bool:
        """Whether these settings are refused."""
        found = settings.get(self.key)
        return bool(found) if self.given else self.key in settings and bool(found == self.value)


@dataclass(frozen=True)
class Ahead:
    """Where next-token prediction has names of its own, at any depth.

    Attributes:
        prefix: of all of it. `layers`: the list of its layers. `block`: what stands before the names of a layer's
            tensors there.
        stem: rules below the prefix.
    """

    prefix: str
    layers: str
    block: str = ""
    stem: Rules = Rules()


@dataclass(frozen=True)
class Family:
    """One entry of the table.

    Attributes:
        types: the model types that share it. `when`: only configs that say so.
        refused: why no checkpoint of these types is converted; None where they are.
        inexact: why no direction can be exact, though the writers are known; None where one is.
        layers: names of the lists of decoder layers, below the prefix.
        embedding: of the token embedding's module, all that are in use.
        head: what the output head may be called, the name in released checkpoints first.
        stem, layer: rules for tensors below the prefix, outside of layers and in them.
        beyond: for layers that config.json does not count (next-token prediction). `ahead`: where they have a place of
            their own.
        outside: rules for tensors beside the text tower, whatever stands before their names.
        tower: key of config.json with the text tower's own config; the entry then has no rules for the text tower.
        with_images: name of a module that only those layers have which only run when there is an image.
        gain_offset: what is added to the weights of norms. `skip`: what the stream passes in a layer, in order: steps,
            and the names of modules whose output is added there.
        own: of an entry with a tower, the keys in which it differs from the tower's entry.
    """

    name: str
    types: tuple[str, ...]
    when: Settings = field(default_factory=dict)
    refused: str | None = None
    inexact: str | None = None
    layers: tuple[str, ...] = ("layers",)
    embedding: tuple[str, ...] = ("embed_tokens",)
    head: tuple[str, ...] = ("lm_head",)
    stem: Rules = Rules()
    layer: Rules = Rules()
    beyond: Rules = Rules()
    ahead: Ahead | None = None
    outside: Rules = Rules()
    tower: str | None = None
    with_images: str | None = None
    gain_offset: float = 0.0
    skip: tuple[StepRule | str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    own: frozenset[str] = frozenset()


def _above(name: str) -> Iterator[str]:
    """Every name that a dotted name begins with."""
    return itertools.accumulate(name.split(".")[:-1], "{}.{}".format)


def _foldings(name: str) -> Iterator[str]:
    """The name with `*` for none, some and all of its numbers: a rule may be for one number alone."""
    parts = name.split(".")
    if sum(bool(_NUMBER.fullmatch(part)) for part in parts) > _MOST_NUMBERS:
        return iter((name, fold_numbers(name)))
    choices = [(part, "*") if _NUMBER.fullmatch(part) else (part,) for part in parts]
    return map(".".join, itertools.product(*choices))


def fold_numbers(name: str) -> str:
    """The name with `*` for every part that is a number."""
    return _NUMBER.sub("*", name)
