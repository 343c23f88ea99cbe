"""The table: families/*.yaml, one entry a model type, made of the parts in parts.yaml.

An entry has the keys

- `like`: another model type whose entry fills in every key that this one leaves out;
- `refused`: why this type is not converted (then nothing else);
- `config`: `hidden` and `layers`, the keys of config.json for width and depth, where they are not the usual ones;
- `defaults`: what transformers takes for the keys that `bias`, `when` and `refuse` name, and for tie_word_embeddings,
  where config.json is silent;
- `refuse`: configs that are not covered, `{key, is or differs_from, why}`;
- `prefix`, `layers`, `embedding`, `head`: the names' usual prefix, the list of layers, the token embedding's module and
  what the head's may be;
- `stem` and `layer`: lists of parts, by name or written out; a later part adds to or overrides an earlier one.

A part maps module names (`a.{q,k}_proj` stands for both) to what they are: one of `writes: AXIS` and `reads: AXIS` (the
axis of the weight that has the stream's width), `norm: hidden` or `norm: head`, `ignored: REASON` (there the name is a
whole tensor's), and beside it `kind` of a writer, `bias` (true or a key of `defaults`), `gain: {norm: MODULE,
offset: X}` for a writer whose output a norm of the same layer scales by X + weight, and `when` (keys of `defaults`,
`not KEY`) for modules that not every config has.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import yaml

from abliterate.architecture.rules import LAYER, Condition, Family, GainRule, Refusal, Rule
from abliterate.errors import ArchitectureError

Part = Mapping[str, Mapping[str, Any]]
Entry = Mapping[str, Any]
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_ENTRY_KEYS = frozenset(
    (
        "like",
        "refused",
        "config",
        "defaults",
        "refuse",
        "prefix",
        "layers",
        "embedding",
        "head",
        "stem",
        "layer",
        "tied_flag",
    )
)
_NEEDED = frozenset(("defaults", "prefix", "layers", "embedding", "head", "stem", "layer"))
_ROLES = ("writes", "reads", "norm", "ignored")
_MODULE_KEYS = frozenset((*_ROLES, "kind", "bias", "gain", "when"))


def load_table() -> dict[str, Family]:
    """Every family, by model type.

    Raises:
        ArchitectureError: an entry is not well formed.
    """
    folder = resources.files("abliterate.architecture")
    parts = yaml.safe_load((folder / "parts.yaml").read_text("utf-8"))
    files = sorted((f for f in (folder / "families").iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    named = [(f.name.removesuffix(".yaml"), yaml.safe_load(f.read_text("utf-8"))) for f in files]
    return read_table(named, parts)


def read_table(files: Sequence[tuple[str, Mapping[str, Entry]]], parts: Mapping[str, Part]) -> dict[str, Family]:
    """Files of entries, by the family's name, to families by model type; see `load_table`."""
    entries: dict[str, Entry] = {}
    homes: dict[str, str] = {}
    for family, found in files:
        for model_type, entry in found.items():
            _require(
                model_type not in entries, f"{model_type} has two entries, in {homes.get(model_type)} and {family}"
            )
            _require(set(entry) <= _ENTRY_KEYS, f"{model_type}: unknown keys {sorted(set(entry) - _ENTRY_KEYS)}")
            entries[model_type], homes[model_type] = entry, family
    return {
        model_type: _family(homes[model_type], model_type, _inherited(model_type, entries), parts)
        for model_type in entries
    }


def find_family(model_type: str) -> Family:
    """The entry of a model type.

    Raises:
        ArchitectureError: there is none, or it says that the type is not converted.
    """
    table = load_table()
    known = ", ".join(sorted(name for name, family in table.items() if family.refused is None))
    if model_type not in table:
        raise ArchitectureError(f"model type {model_type} is not in the table of residual writers; supported: {known}")
    if (why := table[model_type].refused) is not None:
        raise ArchitectureError(f"model type {model_type} is not supported: {why}")
    return table[model_type]


def expand(name: str) -> list[str]:
    """`a.{x,y}.b` to `a.x.b` and `a.y.b`."""
    parts = _CHOICE.split(name)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(pick) for pick in itertools.product(*choices)]


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ArchitectureError(f"the table of architectures is damaged: {problem}")


def _inherited(model_type: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry with what `like` fills in."""
    entry, seen = entries[model_type], {model_type}
    while (parent := entry.get("like")) is not None:
        _require(parent in entries and parent not in seen, f"{model_type} is like {parent}, which does not work")
        seen.add(parent)
        own = {key: value for key, value in entry.items() if key != "like"}
        entry = {**entries[parent], **own}
    return entry


def _family(name: str, model_type: str, entry: Entry, parts: Mapping[str, Part]) -> Family:
    if "refused" in entry:
        return Family(name, model_type, entry["refused"])
    _require(set(entry) >= _NEEDED, f"{model_type}: {sorted(_NEEDED - set(entry))} are not there")
    config = entry.get("config", {})
    family = Family(
        name,
        model_type,
        None,
        _tuple(config.get("hidden", "hidden_size")),
        _tuple(config.get("layers", "num_hidden_layers")),
        entry["defaults"],
        entry["prefix"],
        entry["layers"],
        f"{entry['embedding']}.weight",
        tuple(f"{head}.weight" for head in entry["head"]),
        tuple(_rules(entry, parts, model_type)),
        tuple(Refusal(r["key"], r["why"], r.get("is"), r.get("differs_from")) for r in entry.get("refuse", ())),
        entry.get("tied_flag", "tie_word_embeddings"),
    )
    _check_family(family)
    return family


def _tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _check_family(family: Family) -> None:
    """No two rules for one tensor; every key has its default; every gain is a norm of the table."""
    rules = {rule.folded: rule for rule in family.rules}
    _require(len(rules) == len(family.rules), f"{family.model_type} has two rules for one tensor")
    _require(family.embedding in rules, f"{family.model_type} has no rule for its embedding")
    named = {s.removeprefix("not ") for rule in family.rules for s in rule.present.switches}
    named |= {refusal.key for refusal in family.refusals} | {"tie_word_embeddings"}
    missing = sorted(named - set(family.defaults))
    _require(not missing, f"{family.model_type} says no default for {missing}")
    gains = {rule.gain.tensor.replace(LAYER, "*") for rule in family.rules if rule.gain}
    norms = {rule.folded for rule in family.rules if rule.role == "norm" and rule.axis == 0}
    _require(gains <= norms, f"{family.model_type} has a gain that is no norm of the stream: {sorted(gains - norms)}")


def _rules(entry: Entry, parts: Mapping[str, Part], model_type: str) -> Iterator[Rule]:
    for section, place in (("stem", ""), ("layer", f"{entry['layers']}.{LAYER}.")):
        for module, facts in _merged(entry[section], parts, model_type).items():
            _require(set(facts) <= _MODULE_KEYS, f"{model_type}, {module}: unknown keys in {sorted(facts)}")
            _require(sum(role in facts for role in _ROLES) == 1, f"{model_type}, {module}: needs one of {_ROLES}")
            _require("kind" in facts or "writes" not in facts, f"{model_type}, {module}: writes, but has no kind")
            yield from _module_rules(place, module, facts)


def _merged(section: Sequence[str | Part], parts: Mapping[str, Part], model_type: str) -> dict[str, dict[str, Any]]:
    """Module names to facts; later parts add to earlier ones."""
    modules: dict[str, dict[str, Any]] = {}
    for item in section:
        _require(not isinstance(item, str) or item in parts, f"{model_type} names a part that is not there: {item}")
        for names, facts in (parts[item] if isinstance(item, str) else item).items():
            for module in expand(names):
                modules[module] = modules.get(module, {}) | dict(facts)
    return modules


def _module_rules(place: str, module: str, facts: Mapping[str, Any]) -> Iterator[Rule]:
    """The rules of a module's weight and bias."""
    name, when = place + module, _tuple(facts.get("when", ()))
    if "ignored" in facts:
        yield Rule(name, "outside", facts["ignored"], present=Condition(when), optional=True)
        return
    yield _weight_rule(place, name, facts, Condition(when))
    bias = facts.get("bias", False)
    if bias is not False:
        switches = when if bias is True else (*when, bias)
        yield _bias_rule(place, name, facts, Condition(switches))


def _weight_rule(place: str, name: str, facts: Mapping[str, Any], present: Condition) -> Rule:
    weight = f"{name}.weight"
    if "writes" in facts:
        gain = _gain_rule(place, facts)
        return Rule(weight, "writer", _writes(facts, gain), facts["kind"], facts["writes"], 2, gain, present)
    if "reads" in facts:
        return Rule(weight, "reader", "reads the stream, through a norm", "", facts["reads"], 2, present=present)
    return _norm_rule(weight, facts, present)


def _bias_rule(place: str, name: str, facts: Mapping[str, Any], present: Condition) -> Rule:
    bias = f"{name}.bias"
    if "writes" in facts:
        gain = _gain_rule(place, facts)
        return Rule(bias, "writer", _writes({"kind": f"{facts['kind']} bias"}, gain), "bias", 0, 1, gain, present)
    if "reads" in facts:
        return Rule(bias, "reader", "bias inside of a sublayer", "", None, 1, present=present)
    return _norm_rule(bias, facts, present)


def _norm_rule(name: str, facts: Mapping[str, Any], present: Condition) -> Rule:
    if facts["norm"] == "head":
        return Rule(name, "norm", "normalises queries or keys head by head", "", None, 1, present=present)
    return Rule(name, "norm", "normalises the stream for a reader, or a sublayer's output", "", 0, 1, present=present)


def _gain_rule(place: str, facts: Mapping[str, Any]) -> GainRule | None:
    gain = facts.get("gain")
    return GainRule(f"{place}{gain['norm']}.weight", float(gain["offset"])) if gain else None


def _writes(facts: Mapping[str, Any], gain: GainRule | None) -> str:
    through = f", through {gain.tensor.rpartition('.weight')[0].rpartition('.')[2]}" if gain else ""
    return f"{facts['kind']}: adds to the stream{through}"
