"""From headers and config to a plan: every tensor matched by a rule, every expected tensor there, or a clear no."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from abliterate.architecture.table import LAYER, Family, Rule, find_family
from abliterate.architecture.writer import Gain, Plan, TensorRole, Writer
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import TensorInfo
from abliterate.errors import ArchitectureError

EDITABLE = ("F64", "F32", "F16", "BF16")
MOST_LAYERS = 10_000


def plan_architecture(checkpoint: Checkpoint) -> Plan:
    """The plan of a checkpoint.

    Raises:
        ArchitectureError: the model type is not supported, its config rules out an exact edit, or a tensor is missing,
            unknown, or not of the expected shape.
    """
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise ArchitectureError(f"{checkpoint.folder}: config.json names no model_type")
    family = find_family(model_type)
    refusal = next((r for r in family.refusals if r.applies(checkpoint.config)), None)
    if refusal:
        raise ArchitectureError(f"this {model_type} ({refusal.key} in config.json) is not supported: {refusal.why}")
    return _Matcher(checkpoint, family, model_type).plan()


@dataclass(frozen=True)
class _Match:
    rule: Rule
    layer: int | None
    prefix: str

    @property
    def gain(self) -> Gain | None:
        if self.rule.gain is None:
            return None
        return Gain(self.prefix + self.rule.gain.replace(LAYER, str(self.layer)), self.rule.offset)


@dataclass(frozen=True)
class _Matcher:
    """Holds one checkpoint against one family."""

    checkpoint: Checkpoint
    family: Family
    model_type: str

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.checkpoint.tensors

    def plan(self) -> Plan:
        family, prefix = self.family, self._prefix()
        hidden, layers = self._count(family.hidden_key), self._count(family.layers_key)
        matches = {name: self._match(name, prefix, layers) for name in self.tensors}
        self._check_complete(prefix, layers)
        writers = tuple(self._writers(matches, hidden))
        tied = bool(self.config.get("tie_word_embeddings", family.tied_by_default[self.model_type]))
        self._check_head(tied, prefix)
        return Plan(
            self.model_type,
            family.name,
            hidden,
            layers,
            tied,
            prefix + family.embedding,
            family.head,
            "tie_word_embeddings",
            prefix + family.stack,
            writers,
            tuple(self._role(name, match, tied) for name, match in matches.items()),
        )

    def _count(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 10_000_000:
            raise ArchitectureError(f"config.json has no usable {key} ({value!r})")
        if key == self.family.layers_key and value > MOST_LAYERS:
            raise ArchitectureError(f"config.json claims {value} layers")
        return value

    def _prefix(self) -> str:
        """What stands before the family's names in this file: released checkpoints differ in it."""
        name = self.family.embedding
        found = [tensor for tensor in self.tensors if tensor == name or tensor.endswith(f".{name}")]
        if len(found) != 1:
            problem = "no" if not found else "more than one"
            raise ArchitectureError(
                f"{self.checkpoint.folder} says it is {self.model_type}, but has {problem} tensor {name}; "
                "config and weights do not belong together"
            )
        prefix = found[0].removesuffix(name)
        if prefix not in ("", self.family.prefix):
            raise ArchitectureError(f"the token embedding is named {found[0]}, not {self.family.prefix}{name}")
        return prefix

    def _match(self, name: str, prefix: str, layers: int) -> _Match | None:
        """The one rule for a tensor; None for the head."""
        if name == self.family.head:
            return None
        for rule in self.family.rules:
            found = rule.pattern.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
            if not found or not rule.condition.holds(self.model_type, self.config):
                continue
            layer = int(found[1]) if rule.in_layer else None
            if layer is None or (layer < layers and str(layer) == found[1]):
                return _Match(rule, layer, prefix)
        raise ArchitectureError(
            f"tensor {name} {list(self.tensors[name].shape)} is not accounted for in {self.model_type}; "
            "an edit that does not know it could not be exact"
        )

    def _check_complete(self, prefix: str, layers: int) -> None:
        for name in self._expected(prefix, layers):
            if name not in self.tensors:
                raise ArchitectureError(
                    f"tensor {name} is missing: a {self.model_type} checkpoint with this config has it"
                )

    def _expected(self, prefix: str, layers: int) -> Iterator[str]:
        for rule in self.family.rules:
            if rule.role == "outside" or not rule.condition.holds(self.model_type, self.config):
                continue
            for layer in range(layers) if rule.in_layer else (0,):
                yield prefix + rule.name.replace(LAYER, str(layer))

    def _writers(self, matches: Mapping[str, _Match | None], hidden: int) -> Iterator[Writer]:
        for name, match in matches.items():
            if match is None or match.rule.role != "writer":
                continue
            self._check_shape(name, match.rule, hidden)
            if match.gain and self.tensors[match.gain.tensor].shape != (hidden,):
                raise ArchitectureError(f"{match.gain.tensor} is no norm weight of {hidden} entries")
            yield Writer(name, match.rule.reason, match.rule.axis, match.gain, match.layer)

    def _check_shape(self, name: str, rule: Rule, hidden: int) -> None:
        info = self.tensors[name]
        dimensions = 1 if name.endswith(".bias") else 2
        if len(info.shape) != dimensions or info.shape[rule.axis] != hidden:
            raise ArchitectureError(
                f"{name} has shape {list(info.shape)}, and axis {rule.axis} should be the hidden size {hidden}"
            )
        if info.dtype not in EDITABLE:
            raise ArchitectureError(f"{name} is stored in {info.dtype}, which cannot be edited; convert the unquantized original")

    def _check_head(self, tied: bool, prefix: str) -> None:
        stored = self.tensors.get(self.family.head)
        if stored is None and not tied:
            raise ArchitectureError(f"tensor {self.family.head} is missing, and config.json does not tie the head")
        if stored is not None and stored.shape != self.tensors[prefix + self.family.embedding].shape:
            raise ArchitectureError(f"{stored.name} has shape {list(stored.shape)}, which is not the embedding's")

    def _role(self, name: str, match: _Match | None, tied: bool) -> TensorRole:
        if match is None:
            reason = "stored copy of the tied embedding" if tied else "reads the stream after the last layer"
            return TensorRole(name, "head", reason)
        return TensorRole(name, match.rule.role, match.rule.reason)
