"""From headers and config to a plan: every tensor matched by a rule, every expected tensor there, or a clear no."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from abliterate.architecture.rules import LAYER, Family, Rule, Settings, fold_numbers
from abliterate.architecture.table import find_family
from abliterate.architecture.writer import Gain, Plan, TensorRole, Writer
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import TensorInfo
from abliterate.errors import ArchitectureError

EDITABLE = ("F64", "F32", "F16", "BF16")
MOST_LAYERS, MOST_HIDDEN = 10_000, 10_000_000


def plan_architecture(checkpoint: Checkpoint) -> Plan:
    """The plan of a checkpoint, from its headers and config.json alone.

    Raises:
        ArchitectureError: the model type is not supported, its config rules out an exact edit, or a tensor is missing,
            unknown, of an unexpected shape, or stored in a dtype that cannot be edited; the message names it.
    """
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise ArchitectureError(f"{checkpoint.folder}: config.json names no model_type, so nothing is known about it")
    family = find_family(model_type)
    named = {key: value for key, value in checkpoint.config.items() if value is not None}
    settings = {**family.defaults, **named}
    refusal = next((refusal for refusal in family.refusals if refusal.applies(settings)), None)
    if refusal is not None:
        value = settings[refusal.key]
        raise ArchitectureError(
            f"this {model_type} ({refusal.key} is {value} in config.json) is not supported: {refusal.why}"
        )
    return _Matcher(checkpoint.tensors, family, settings).plan()


@dataclass(frozen=True)
class _Match:
    """The rule for one stored tensor; no rule for the head."""

    info: TensorInfo
    rule: Rule | None
    layer: int | None = None


@dataclass(frozen=True)
class _Matcher:
    """Holds the tensors of one checkpoint against one family."""

    tensors: Mapping[str, TensorInfo]
    family: Family
    settings: Settings

    def plan(self) -> Plan:
        """See `plan_architecture`."""
        family, prefix = self.family, self._prefix()
        hidden, layers = self._number(family.hidden_keys, MOST_HIDDEN), self._number(family.layers_keys, MOST_LAYERS)
        rules = {rule.folded: rule for rule in family.rules if rule.present.holds(self.settings)}
        self._check_complete(rules, prefix, layers)
        matches = [self._match(info, rules, prefix, layers) for info in self.tensors.values()]
        for match in matches:
            _check_stored(match, hidden)
        head, tied = self._head(prefix + family.embedding)
        copied = tied and head in self.tensors
        writers = [match for match in matches if match.rule is not None and match.rule.role == "writer"]
        writers.sort(key=lambda match: (-1 if match.layer is None else match.layer, family.rules.index(match.rule)))
        return Plan(
            model_type=family.model_type,
            family=family.name,
            hidden_size=hidden,
            num_layers=layers,
            tied=tied,
            embedding=prefix + family.embedding,
            head=head,
            tied_flag=family.tied_flag,
            layers_prefix=prefix + family.layers,
            writers=tuple(_writer(match, prefix) for match in writers),
            roles=tuple(_role(match, copied) for match in matches),
            head_copy=copied,
        )

    def _number(self, keys: tuple[str, ...], most: int) -> int:
        value = next((self.settings[key] for key in keys if key in self.settings), None)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise ArchitectureError(
                f"config.json has no usable {keys[0]} ({value!r}); it must be a number from 1 to {most}"
            )
        return value

    def _prefix(self) -> str:
        """What stands before the family's names: files of one model differ in it ("transformer." or nothing, say)."""
        name = self.family.embedding
        found = [tensor for tensor in self.tensors if tensor == name or tensor.endswith(f".{name}")]
        if len(found) != 1:
            raise ArchitectureError(
                f"config.json says {self.family.model_type}, but the weights have "
                f"{'no tensor' if not found else ' and '.join(found[:2]) + ' for'} {name}; they do not belong together"
            )
        return found[0].removesuffix(name)

    def _match(self, info: TensorInfo, rules: Mapping[str, Rule], prefix: str, layers: int) -> _Match:
        if info.name in self.family.heads:
            return _Match(info, None)
        name = info.name.removeprefix(prefix)
        # A name that has a * itself would pass for a folded one.
        rule = rules.get(fold_numbers(name)) if info.name.startswith(prefix) and "*" not in name else None
        if rule is None:
            raise self._unaccounted(info, "is not accounted for")
        if not rule.in_layer:
            return _Match(info, rule)
        layer = int(name.removeprefix(f"{self.family.layers}.").partition(".")[0])
        if layer >= layers:
            raise self._unaccounted(info, f"is in a layer beyond the {layers} of config.json, and not accounted for")
        return _Match(info, rule, layer)

    def _unaccounted(self, info: TensorInfo, problem: str) -> ArchitectureError:
        return ArchitectureError(
            f"tensor {info.name} {list(info.shape)} {problem} in {self.family.model_type} with this config.json: "
            "it may write to the residual stream, so no edit could be called exact"
        )

    def _check_complete(self, rules: Mapping[str, Rule], prefix: str, layers: int) -> None:
        required = [rule for rule in rules.values() if not rule.optional]
        for name in _expected(required, prefix, layers):
            if name not in self.tensors:
                raise ArchitectureError(
                    f"tensor {name} is missing: {self.family.model_type} with this config.json has it; the checkpoint "
                    "is incomplete, renamed, or of another architecture"
                )

    def _head(self, embedding: str) -> tuple[str, bool]:
        """Name of the head's tensor, stored or as it would be, and whether the head shares the embedding."""
        stored = [name for name in self.family.heads if name in self.tensors]
        tied = self.settings[self.family.tied_flag]
        if not isinstance(tied, bool):
            raise ArchitectureError(f"config.json has {self.family.tied_flag} = {tied!r}; it must be true or false")
        if len(stored) > 1:
            raise ArchitectureError(f"the weights have two heads, {stored[0]} and {stored[1]}; remove one")
        if not stored and not tied:
            raise ArchitectureError(
                f"tensor {self.family.heads[0]} is missing, and {self.family.tied_flag} is false: this is no model "
                "that generates text, or its config.json is of another one"
            )
        if stored and self.tensors[stored[0]].shape != self.tensors[embedding].shape:
            shapes = f"{list(self.tensors[stored[0]].shape)}, not {list(self.tensors[embedding].shape)}"
            raise ArchitectureError(f"the head {stored[0]} has the shape {shapes} as the embedding {embedding}")
        return (stored or self.family.heads)[0], tied


def _expected(rules: list[Rule], prefix: str, layers: int) -> Iterator[str]:
    for rule in rules:
        if not rule.in_layer:
            yield prefix + rule.name
    for layer in range(layers):
        yield from (prefix + rule.name.replace(LAYER, str(layer)) for rule in rules if rule.in_layer)


def _check_stored(match: _Match, hidden: int) -> None:
    """Shape and dtype are those that the rule says."""
    rule, info = match.rule, match.info
    if rule is None or rule.dimensions is None:
        return
    if len(info.shape) != rule.dimensions:
        raise ArchitectureError(
            f"tensor {info.name} has shape {list(info.shape)}; it should have {rule.dimensions} dimensions"
        )
    if rule.axis is not None and info.shape[rule.axis] != hidden:
        raise ArchitectureError(
            f"tensor {info.name} has shape {list(info.shape)}; along axis {rule.axis} it should have the width of the "
            f"stream, {hidden}"
        )
    if info.dtype not in EDITABLE:
        raise ArchitectureError(
            f"tensor {info.name} is stored as {info.dtype}, and only {', '.join(EDITABLE)} can be edited; convert the "
            "unquantized original"
        )


def _writer(match: _Match, prefix: str) -> Writer:
    rule = match.rule
    assert rule is not None and rule.axis is not None
    gain = None
    if rule.gain is not None:
        gain = Gain(prefix + rule.gain.tensor.replace(LAYER, str(match.layer)), rule.gain.offset)
    return Writer(match.info.name, rule.kind, rule.axis, gain, match.layer)


def _role(match: _Match, copied: bool) -> TensorRole:
    if match.rule is not None:
        return TensorRole(match.info.name, match.rule.role, match.rule.reason)
    if copied:
        return TensorRole(
            match.info.name, "head", "stored copy of the tied embedding; edited with it unless the head is untied"
        )
    return TensorRole(match.info.name, "head", "reads the stream after the final norm")
