"""The table: one declarative entry a family in families/*.yaml, read into rules.

An entry names its model types (and whether their heads are tied by default), the stack of decoder layers, and every
tensor a checkpoint of the family may hold, as writer, reader, norm, or ignored buffer. In names, `{N}` is a layer and
`{q,k,v}` stands for each of its parts; `when` says for which configs and model types a tensor is there.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

import yaml

from abliterate.architecture.writer import Role
from abliterate.errors import ArchitectureError

LAYER = "{N}"
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True)
class Condition:
    """When a tensor is there: always for some model types, never outside of `only`, else as a config key says."""

    key: str | None = None
    default: bool = False
    always: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    def holds(self, model_type: str, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint of this type and config has the tensor."""
        if self.only is not None and model_type not in self.only:
            return False
        if model_type in self.always or self.key is None:
            return model_type in self.always or not self.always
        return bool(config.get(self.key, self.default))


@dataclass(frozen=True)
class Rule:
    """One tensor name of a family, what it is, and for writers how it writes.

    Attributes:
        name: without the stack's prefix; `{N}` is the layer.
        axis: the hidden axis of a writer. `gain`: the norm weight that follows it, and `offset` to add to it.
    """

    name: str
    role: Role
    reason: str
    condition: Condition = Condition()
    axis: int = 0
    gain: str | None = None
    offset: float = 0.0

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names, the layer's index as the group."""
        return re.compile(re.escape(self.name).replace(re.escape(LAYER), r"(\d+)"))

    @property
    def in_layer(self) -> bool:
        """Whether there is one of it in every layer."""
        return LAYER in self.name


@dataclass(frozen=True)
class Refusal:
    """A config that the family's rules are not exact for."""

    key: str
    why: str
    value: Any = None
    differs_from: str | None = None

    def applies(self, config: Mapping[str, Any]) -> bool:
        """Whether this config is one of those."""
        if self.key not in config:
            return False
        if self.differs_from is not None:
            return bool(config[self.key] != config.get(self.differs_from))
        return bool(config[self.key] == self.value)


@dataclass(frozen=True)
class Family:
    """An entry of the table."""

    name: str
    tied_by_default: Mapping[str, bool]
    stack: str
    prefix: str
    embedding: str
    head: str
    hidden_key: str
    layers_key: str
    rules: tuple[Rule, ...]
    refusals: tuple[Refusal, ...]


def load_table() -> dict[str, Family]:
    """Every family, by model type."""
    folder = resources.files("abliterate.architecture") / "families"
    files = sorted((item for item in folder.iterdir() if item.name.endswith(".yaml")), key=lambda item: item.name)
    families = [read_family(f.name.removesuffix(".yaml"), yaml.safe_load(f.read_text("utf-8"))) for f in files]
    return {model_type: family for family in families for model_type in family.tied_by_default}


def find_family(model_type: str) -> Family:
    """The entry of a model type.

    Raises:
        ArchitectureError: there is none.
    """
    table = load_table()
    if model_type not in table:
        raise ArchitectureError(
            f"model type {model_type} is not supported: its residual writers are not in the table; "
            f"supported: {', '.join(sorted(table))}"
        )
    return table[model_type]


def read_family(name: str, entry: Mapping[str, Any]) -> Family:
    """One entry of the table."""
    keys = entry.get("keys", {})
    return Family(
        name,
        {model_type: bool(facts["tied"]) for model_type, facts in entry["model_types"].items()},
        entry["stack"],
        entry["prefix"],
        entry["embedding"],
        entry["head"],
        keys.get("hidden", "hidden_size"),
        keys.get("layers", "num_hidden_layers"),
        tuple(_rules(entry)),
        tuple(Refusal(r["key"], r["why"], r.get("is"), r.get("differs_from")) for r in entry.get("refused", ())),
    )


_SECTIONS: Sequence[tuple[str, Role, str]] = (
    ("writers", "writer", ""),
    ("readers", "reader", "reads the stream, or works inside of a sublayer"),
    ("norms", "norm", "normalises; adds nothing to the stream along a direction of its own"),
    ("ignored", "outside", "a buffer that transformers does not load"),
)


def _rules(entry: Mapping[str, Any]) -> Iterator[Rule]:
    for section, role, reason in _SECTIONS:
        for item in entry.get(section, ()):
            facts = {"name": item} if isinstance(item, str) else item
            yield from _rules_of(facts, role, reason)


def _rules_of(facts: Mapping[str, Any], role: Role, reason: str) -> Iterator[Rule]:
    when = facts.get("when", {})
    only = when.get("only")
    condition = Condition(
        when.get("key"), when.get("default", False), tuple(when.get("always", ())), tuple(only) if only else None
    )
    gain = facts.get("gain", {})
    for name in expand(facts["name"]):
        yield Rule(
            name, role, facts.get("kind", reason), condition, facts.get("axis", 0), gain.get("tensor"),
            gain.get("offset", 0.0),
        )


def expand(name: str) -> list[str]:
    """`a.{x,y}.b` to `a.x.b` and `a.y.b`."""
    parts = _CHOICE.split(name)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(pick) for pick in itertools.product(*choices)]
