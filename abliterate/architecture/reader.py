"""Parts of the table to rules by name; see `table` for what a part may say."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.architecture.rules import Rule, Rules, StepRule
from abliterate.errors import ArchitectureError

Part = Mapping[str, Any]
KINDS = ("embedding", "position", "attention", "mlp", "mixer", "projector", "bias")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_PART_KEYS = frozenset(("writes", "reads", "norms", "inside"))
_GAIN_KEYS = frozenset(("norm", "center", "taps"))
_WRITER_KEYS = frozenset(("kind", "axis", "of", "may_be_narrow"))
_REASONS = {
    "reads": ("reader", "reads the stream, or works within a sublayer"),
    "norms": ("norm", "normalises the stream for a reader, or a sublayer's output"),
    "inside": ("inside", "works within a sublayer"),
    "outside": ("outside", "is not part of the text decoder"),
}


def expand(name: str) -> list[str]:
    """`a.{x,y}.b` to `a.x.b` and `a.y.b`."""
    parts = _CHOICE.split(name)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(pick).replace(" ", "") for pick in itertools.product(*choices)]


def require(condition: bool, problem: str) -> None:
    """Stops where the table itself is wrong."""
    if not condition:
        raise ArchitectureError(f"the table of architectures is damaged: {problem}")


def steps(gain: Any) -> tuple[StepRule, ...]:
    """A gain as the table has it, the step nearest to the stream first."""
    if isinstance(gain, list):
        return tuple(step for item in gain for step in steps(item))
    if isinstance(gain, str):
        return (StepRule("scale", gain),)
    require(set(gain) <= _GAIN_KEYS, f"unknown keys in a gain: {sorted(set(gain) - _GAIN_KEYS)}")
    if "taps" in gain:
        return (StepRule("taps", gain["taps"]),)
    scale = StepRule("scale", gain["norm"])
    return (scale, StepRule("center")) if gain.get("center") else (scale,)


class PartReader:
    """Makes rules of one family's parts."""

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Part],
        gains: Mapping[str, tuple[StepRule, ...]],
        passed: Sequence[str],
    ) -> None:
        self._name, self._parts, self._gains, self._passed = name, parts, gains, set(passed)
        self.gained: set[str] = set()

    def rules(self, section: Sequence[str | Part], outside: Sequence[str] = ()) -> Rules:
        """The rules of a list of parts; later ones win."""
        exact: dict[str, Rule] = {}
        modules: dict[str, Rule] = {}
        trees: dict[str, Rule] = {}
        for part in map(self._part, section):
            for key in ("reads", "norms", "inside"):
                for module in (m for names in part.get(key, ()) for m in expand(names)):
                    found = trees if module.endswith(".**") else modules
                    found[module.removesuffix(".**")] = Rule(*_REASONS[key], module)  # type: ignore[arg-type]
            for names, facts in part.get("writes", {}).items():
                for module in expand(names):
                    exact |= self._writes(module, facts)
        for module in (m for names in outside for m in expand(names)):
            trees[module.removesuffix(".**")] = Rule(*_REASONS["outside"], module)  # type: ignore[arg-type]
        return Rules(exact | self._norm_biases(exact, modules), modules, trees)

    def _part(self, item: str | Part) -> Part:
        require(not isinstance(item, str) or item in self._parts, f"{self._name}: there is no part {item}")
        part = self._parts[item] if isinstance(item, str) else item
        require(set(part) <= _PART_KEYS, f"{self._name}: unknown keys in a part: {sorted(set(part) - _PART_KEYS)}")
        return part

    def _writes(self, module: str, facts: Any) -> dict[str, Rule]:
        facts = {"kind": facts} if isinstance(facts, str) else facts
        require(
            set(facts) <= _WRITER_KEYS, f"{self._name}: unknown keys of {module}: {sorted(set(facts) - _WRITER_KEYS)}"
        )
        kind, of = facts["kind"], facts.get("of", 2)
        axis = facts.get("axis", 0)
        axes = tuple(axis) if isinstance(axis, list) else (axis,)
        require(kind in KINDS, f"{self._name}: {module} has the unknown kind {kind}")
        require(all(0 <= axis < of for axis in axes), f"{self._name}: {module} has no axis {axes}")
        gain = self._gains.get(module, ())
        self.gained |= {module} & set(self._gains)
        narrow = bool(facts.get("may_be_narrow"))
        weight = Rule("writer", _adds(kind, gain), module, kind, axes, of, gain, narrow)
        bias = Rule("writer", _adds(f"{kind} bias", gain), module, "bias", (0,), 1, gain, narrow)
        return {module: weight, f"{module}.weight": weight, f"{module}.bias": bias}

    def _norm_biases(self, exact: Mapping[str, Rule], modules: Mapping[str, Rule]) -> dict[str, Rule]:
        """Norms whose output goes to the stream: their bias writes there."""
        found: dict[str, Rule] = {}
        for rule in exact.values():
            for i, step in enumerate(rule.gain):
                if step.module is not None and step.kind == "scale":
                    nearer = rule.gain[:i]
                    found[f"{step.module}.bias"] = Rule(
                        "writer", _adds("norm bias", nearer), step.module, "bias", (0,), 1, nearer
                    )
        for module in sorted(self._passed & set(modules)):
            found[f"{module}.bias"] = Rule("writer", _adds("norm bias", ()), module, "bias", (0,), 1)
        return found


def _adds(what: str, gain: Sequence[StepRule]) -> str:
    named = [step.module.rpartition(".")[2] for step in gain if step.module]
    return f"{what}: adds to the stream" + (f", through {' and '.join(named)}" if named else "")
