"""Every stored tensor held against an entry of the table: which rule it falls under, and where it is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from abliterate.architecture.blueprint import Blueprint, Place
from abliterate.architecture.entry import Entry
from abliterate.architecture.rules import Ahead, Rule, Rules
from abliterate.checkpoint.header import TensorInfo
from abliterate.errors import ArchitectureError

_HEAD_BIAS = Rule("head", "bias of the output head", "")


@dataclass(frozen=True)
class Match:
    """One tensor.

    Attributes:
        rule: None where the table has none for it.
        place: where it goes in the model. `head`: it is the output head, or a copy of it.
        scope: what stands before the names of its neighbours: of its layer, or of the stem.
        layer: index of its layer; None outside of layers. `list`: which list of layers.
        ahead: it belongs to next-token prediction, which transformers does not run.
    """

    info: TensorInfo
    rule: Rule | None
    place: Place
    scope: str = ""
    layer: int | None = None
    list: int = 0
    ahead: bool = False
    head: bool = False

    @property
    def writes(self) -> bool:
        """Whether it is a residual writer."""
        return self.rule is not None and self.rule.role == "writer" and not self.head


class Account:
    """The matches of one checkpoint.

    Raises:
        ArchitectureError: the checkpoint has no token embedding of the entry's name.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], entry: Entry, blueprint: Blueprint, model_type: str) -> None:
        self._tensors, self._entry, self._blueprint, self._model_type = tensors, entry, blueprint, model_type
        self.places = blueprint.places(tensors)
        self.embedding, self.prefix = self._embedding()
        self.counts = tuple(self._count(name) for name in entry.text.layers)

    def matches(self) -> Iterator[Match]:
        """One for every tensor, in the checkpoint's order."""
        for info in self._tensors.values():
            yield self._match(info)

    def _embedding(self) -> tuple[str, str]:
        """The tensor that is the token embedding, and what stands before its name: files of one model differ in it."""
        text = self._entry.text
        ends = [end for name in text.embedding for end in (f"{name}.weight", name)]
        found = {
            tensor: tensor.removesuffix(end)
            for end in ends
            for tensor in self._tensors
            if tensor == end or tensor.endswith(f".{end}")
        }
        used = {tensor: prefix for tensor, prefix in found.items() if self._has_layers(prefix)}
        if len(used) > 1:
            used = {t: p for t, p in used.items() if self._blueprint.embedding in self.places[t].parameters}
        if len(used) != 1:
            what = " and ".join(list(found)[:2]) + " for" if found else "no tensor"
            raise ArchitectureError(
                f"config.json says {self._model_type}, but the weights have {what} {ends[0]} beside "
                f"{text.layers[0]}; they do not belong together"
            )
        return next(iter(used.items()))

    def _has_layers(self, prefix: str) -> bool:
        starts = tuple(f"{prefix}{layers}." for layers in self._entry.text.layers)
        return any(name.startswith(starts) for name in self._tensors)

    def _count(self, layers: str) -> int:
        """How many layers transformers has in a list."""
        numbers = [
            number
            for name, place in self.places.items()
            if place.parameters and (number := self._number(name, f"{self.prefix}{layers}.")) is not None
        ]
        return max(numbers, default=-1) + 1

    @staticmethod
    def _number(name: str, start: str) -> int | None:
        """The number of the layer that a tensor is in, of a list whose names start so."""
        if not name.startswith(start):
            return None
        number = name[len(start) :].partition(".")[0]
        return int(number) if number.isdecimal() and len(number) < 9 and str(int(number)) == number else None

    def _match(self, info: TensorInfo) -> Match:
        name, place, text = info.name, self.places[info.name], self._entry.text
        if self._blueprint.head in place.parameters and name != self.embedding:
            return Match(info, None, place, head=True)
        if self._blueprint.head is not None and any(map(self._beside_head, place.parameters)):
            return Match(info, _HEAD_BIAS, place)
        for index, layers in enumerate(text.layers):
            start = f"{self.prefix}{layers}."
            number = self._number(name, start)
            if number is not None:
                return self._in_layer(info, place, f"{start}{number}.", number, index)
        if text.ahead is not None and (found := self._ahead(info, place, text.ahead)) is not None:
            return found
        if name.startswith(self.prefix):
            rule = text.stem.find(name.removeprefix(self.prefix))
            if rule is not None:
                return Match(info, rule, place, self.prefix)
        return self._beside(info, place)

    def _beside_head(self, parameter: str) -> bool:
        """Whether a parameter is the head's bias."""
        assert self._blueprint.head is not None
        same = parameter.rpartition(".")[0] == self._blueprint.head.rpartition(".")[0]
        return same and parameter not in (self._blueprint.head, self._blueprint.embedding)

    def _in_layer(self, info: TensorInfo, place: Place, scope: str, number: int, index: int) -> Match:
        text, name = self._entry.text, info.name.removeprefix(scope)
        if number < self.counts[index]:
            return Match(info, text.layer.find(name), place, scope, number, index)
        rule = text.beyond.find(name)
        if rule is None and text.beyond != Rules():
            rule = text.layer.find(name)
        return Match(info, rule, place, scope, number, index, ahead=True)

    def _ahead(self, info: TensorInfo, place: Place, ahead: Ahead) -> Match | None:
        """What belongs to next-token prediction under names of its own: in a layer of it, or beside those."""
        text = self._entry.text
        for start, end in _ends(info.name):
            number = self._number(end, f"{ahead.layers}.")
            if number is None:
                continue
            scope, name = f"{start}{ahead.layers}.{number}.", end.removeprefix(f"{ahead.layers}.{number}.")
            if ahead.block and name.startswith(f"{ahead.block}."):
                scope, name = f"{scope}{ahead.block}.", name.removeprefix(f"{ahead.block}.")
            rule = text.layer.find(name) or text.beyond.find(name) or ahead.stem.find(name)
            return Match(info, rule, place, scope, ahead=True)
        for start, end in _ends(info.name):
            if ahead.prefix and end.startswith(f"{ahead.prefix}."):
                rule = ahead.stem.find(end.removeprefix(f"{ahead.prefix}."))
                return Match(info, rule, place, f"{start}{ahead.prefix}.", ahead=True)
        return None

    def _beside(self, info: TensorInfo, place: Place) -> Match:
        """What is not in the text decoder, by any end of its name: writers first, then whole modules."""
        ends = list(_ends(info.name))
        for rules in (self._entry.outside, self._entry.text.outside):
            for start, end in ends:
                if (rule := rules.find(end)) is not None and rule.role == "writer":
                    return Match(info, rule, place, start)
        for rules in (self._entry.outside, self._entry.text.outside):
            for start, end in ends:
                if (rule := rules.find(end)) is not None:
                    return Match(info, rule, place, start)
        return Match(info, None, place)


def _ends(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a name at a dot, the whole name first."""
    start = ""
    while name:
        yield start, name
        first, dot, name = name.partition(".")
        start += first + dot
