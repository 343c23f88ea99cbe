"""What an entry of the table says, read: one rule a tensor name, and the configs it is not exact for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from abliterate.architecture.writer import Role
from abliterate.errors import ArchitectureError

LAYER = "{N}"
Settings = Mapping[str, Any]
_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?![^.])")


@dataclass(frozen=True)
class Condition:
    """All of these switches of config.json are on, or off where their name is led by "not "; none: always."""

    switches: tuple[str, ...] = ()

    def holds(self, settings: Settings) -> bool:
        """Whether a checkpoint with these settings meets it.

        Raises:
            ArchitectureError: a switch is neither true nor false.
        """
        for switch in self.switches:
            value = settings[switch.removeprefix("not ")]
            if not isinstance(value, bool):
                raise ArchitectureError(
                    f"config.json has {switch.removeprefix('not ')} = {value!r}; it must be true or false"
                )
            if value is switch.startswith("not "):
                return False
        return True


@dataclass(frozen=True)
class GainRule:
    """The gain of the norm behind a writer: name of its weight with `{N}` for the layer, and what is added to it."""

    tensor: str
    offset: float


@dataclass(frozen=True)
class Rule:
    """One tensor of a family.

    Attributes:
        name: below the prefix, with `{N}` for the layer.
        role: what it is to the stream. `kind`: of a writer; `reason`: in words, for all.
        axis: the hidden axis, as the architecture has it; None where the tensor has none.
        dimensions: how many it has; None where that is not looked at.
        present: when a checkpoint has it. `optional`: it may be missing all the same (buffers).
    """

    name: str
    role: Role
    reason: str
    kind: str = ""
    axis: int | None = None
    dimensions: int | None = None
    gain: GainRule | None = None
    present: Condition = Condition()
    optional: bool = False

    @property
    def folded(self) -> str:
        """The name as `fold_numbers` makes it of any tensor that the rule is for."""
        return self.name.replace(LAYER, "*")

    @property
    def in_layer(self) -> bool:
        """Whether there is one of it in every layer."""
        return LAYER in self.name


@dataclass(frozen=True)
class Refusal:
    """Configs for which one direction cannot be exact, or that the entry does not cover: a key's value, and why."""

    key: str
    why: str
    value: Any = None
    differs_from: str | None = None

    def applies(self, settings: Settings) -> bool:
        """Whether these settings are refused."""
        value = settings.get(self.key)
        if self.differs_from is not None:
            return value is not None and bool(value != settings.get(self.differs_from))
        return bool(value == self.value)


@dataclass(frozen=True)
class Family:
    """The entry of one model type.

    Attributes:
        name: of the family, which is the file the entry is in.
        refused: why no checkpoint of this type is converted; None where they are.
        hidden_keys: config keys for the width of the stream, the first that is there counts; `layers_keys` likewise.
        defaults: what transformers takes for config keys that config.json does not name.
        prefix: in front of all names in released checkpoints; others are accepted.
        layers: name of the list of decoder layers. `embedding`, `heads`: tensor names, the head's without the prefix.
    """

    name: str
    model_type: str
    refused: str | None = None
    hidden_keys: tuple[str, ...] = ("hidden_size",)
    layers_keys: tuple[str, ...] = ("num_hidden_layers",)
    defaults: Settings = field(default_factory=dict)
    prefix: str = ""
    layers: str = ""
    embedding: str = ""
    heads: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    tied_flag: str = "tie_word_embeddings"


def fold_numbers(name: str) -> str:
    """The name with `*` for every part that is a number."""
    return _NUMBER.sub("*", name)
