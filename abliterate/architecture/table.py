"""The table: families/*.yaml, one entry a family of model types, made of the parts in parts.yaml.

It says of every tensor that a released checkpoint holds what it is to the residual stream, by the names that stand on
disk. What stands before the names ("model.", "model.language_model.", nothing) is left free. Whether a tensor has to be
there is not said: a checkpoint is held against transformers' own model of its config for that, so that a part may name
more than one model has.

A part says, of modules by their names,

- `writes: {MODULE: KIND}`: its output is added to the stream. A linear weight [hidden, in]: `MODULE.weight`, and
  `MODULE.bias` where it is stored. Others are `{kind: KIND, axis: A, of: D}`, with the hidden axis and the number of
  dimensions: 1 of 2 for embeddings and Conv1D, 1 of 3 for experts [experts, hidden, in], 2 of 3 for [experts, in,
  hidden], [1, 2] where both layouts are released; those may also be stored as MODULE itself;
- `reads: [MODULE]`: it takes the stream; `norms: [MODULE]`: norms as wide as the stream; `inside: [MODULE]`: the rest
  of a sublayer. Each covers MODULE and what is directly below it; `MODULE.**` covers everything below it.

`a.{q,k}_proj` stands for both names, `*` for a number. An entry has the keys

- `types`: the model types that share it, as config.json names them; `like`: an entry that fills in what this one leaves
  out; `when: {KEY: VALUE}`: only for configs that say so, and before entries that say nothing;
- `layers` (`layers`), `embedding` (`embed_tokens`): where the decoder layers and the token embedding are;
- `head` (`lm_head`): what the output head is called in released checkpoints, beside or above the prefix;
- `stem`, `layer`: lists of parts, by name or written out, for tensors outside of layers and in them;
- `gains: {MODULE: GAIN}`: what stands between a writer's output and the stream: a norm by its name, a list of norms,
  the one nearest to the stream first, `{norm: NORM, center: true}` for a LayerNorm, `{taps: CONV}` for a depthwise
  convolution added to its own input; a layer without the norm has no
  such gain. `gain_offset`: added to the weights of norms (1 for Gemma 2 and 3);
- `skip`: where the skip path itself has gains, what the stream meets in a layer, in order: norms and gains, and the
  modules whose output is added there;
- `beyond`: further parts of next-token-prediction layers, which have numbers that config.json does not count; `mtp:
  {prefix, layers, block, stem}`: where these have a place of their own, at any depth: the list of layers, what stands
  before the names in a layer, and parts for what is not in a layer;
- `outside`: modules beside the text tower; `writes`: what brings images or sound into the stream; `tower`: the key of
  config.json with the text tower's own config, whose model type then finds the entry for the tower;
- `with_images: MODULE`: layers that have it only run when there is an image;
- `refused: WHY`: these types are not converted; `inexact: WHY`: their writers are known, but no direction is exact;
  `refuse: [{key, is, why}]`, `inexact_if: [{key, is, why}]`: configs of which that is so (`set: true`: that say
  anything at all).
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any

import yaml

from abliterate.architecture.reader import Part, PartReader, expand, require, steps
from abliterate.architecture.rules import Ahead, Family, Refusal, Rules, StepRule

Entry = Mapping[str, Any]
_ENTRY_KEYS = frozenset(
    [
        "types",
        "like",
        "when",
        "layers",
        "head",
        "embedding",
        "stem",
        "layer",
        "gains",
        "gain_offset",
        "skip",
        "beyond",
        "mtp",
        "outside",
        "writes",
        "tower",
        "with_images",
        "refused",
        "inexact",
        "refuse",
        "inexact_if",
    ]
)
_OVERRIDES = frozenset(("layers", "embedding", "mtp", "beyond"))


class Table:
    """Every family, found by model type and config."""

    def __init__(self, families: Iterable[Family]) -> None:
        self.families = tuple(families)
        self._by_type: dict[str, list[Family]] = {}
        for family in sorted(self.families, key=lambda family: not family.when):
            for model_type in family.types:
                self._by_type.setdefault(model_type, []).append(family)

    @property
    def types(self) -> tuple[str, ...]:
        """The model types that have an entry, refused ones too."""
        return tuple(sorted(self._by_type))

    def find(self, model_type: str, settings: Mapping[str, Any]) -> Family | None:
        """The entry for a model type; `settings`: its config with transformers' defaults filled in."""
        choices = self._by_type.get(model_type, [])
        fits = (f for f in choices if all(settings.get(key) == value for key, value in f.when.items()))
        return next(fits, None)


@functools.cache
def load_table() -> Table:
    """The table that comes with the program.

    Raises:
        ArchitectureError: an entry is not well formed.
    """
    folder = resources.files("abliterate.architecture")
    parts = yaml.safe_load((folder / "parts.yaml").read_text("utf-8"))
    files = sorted((f for f in (folder / "families").iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    entries: dict[str, Entry] = {}
    for file in files:
        found = yaml.safe_load(file.read_text("utf-8"))
        twice = sorted(set(found) & set(entries))
        require(not twice, f"{twice} have two entries, one in {file.name}")
        entries |= found
    return read_table(entries, parts)


def read_table(entries: Mapping[str, Entry], parts: Mapping[str, Part]) -> Table:
    """Entries by the family's name; see `load_table`."""
    families = [read_family(name, _inherited(name, entries), parts) for name in entries]
    seen: dict[tuple[str, str], str] = {}
    for family in families:
        for model_type in family.types:
            key = (model_type, repr(sorted(family.when.items())))
            require(key not in seen, f"{model_type} is in {seen.get(key)} and in {family.name}")
            seen[key] = family.name
    return Table(families)


def read_family(name: str, entry: Entry, parts: Mapping[str, Part]) -> Family:
    """One entry, with what it is `like` filled in already.

    Raises:
        ArchitectureError: it is not well formed.
    """
    require(set(entry) <= _ENTRY_KEYS, f"{name}: unknown keys {sorted(set(entry) - _ENTRY_KEYS)}")
    require(bool(entry.get("types")), f"{name} has no types")
    gains = {module: steps(gain) for names, gain in entry.get("gains", {}).items() for module in expand(names)}
    passed = [expanded for item in entry.get("skip", ()) for expanded in _expanded(item)]
    reader = PartReader(name, parts, gains, [item["norm"] if isinstance(item, Mapping) else item for item in passed])
    layer = reader.rules(entry.get("layer", ()))
    mtp = entry.get("mtp")
    strange = sorted(set(mtp or ()) - {"prefix", "layers", "block", "stem"})
    require(not strange, f"{name}: unknown keys in mtp: {strange}")
    return Family(
        name=name,
        types=tuple(entry["types"]),
        when=entry.get("when", {}),
        refused=entry.get("refused"),
        inexact=entry.get("inexact"),
        layers=_tuple(entry.get("layers", "layers")),
        embedding=_tuple(entry.get("embedding", "embed_tokens")),
        head=_tuple(entry.get("head", "lm_head")),
        stem=reader.rules(entry.get("stem", ())),
        layer=layer,
        beyond=reader.rules(entry.get("beyond", ())),
        ahead=Ahead(mtp["prefix"], mtp["layers"], mtp.get("block", ""), reader.rules(mtp.get("stem", ())))
        if mtp
        else None,
        outside=reader.rules([{"writes": entry.get("writes", {})}], outside=entry.get("outside", ())),
        tower=entry.get("tower"),
        with_images=entry.get("with_images"),
        gain_offset=float(entry.get("gain_offset", 0)),
        skip=tuple(step for item in passed for step in _skip(item, layer)),
        refusals=tuple(_refusals(entry)),
        own=frozenset(_OVERRIDES & set(entry)),
    )


def _tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _inherited(name: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry with what `like` fills in."""
    entry, seen = entries[name], {name}
    while (parent := entry.get("like")) is not None:
        require(parent in entries and parent not in seen, f"{name} is like {parent}, which does not work")
        seen.add(parent)
        own = {key: value for key, value in entry.items() if key != "like"}
        inherited = {key: value for key, value in entries[parent].items() if key not in ("types", "when")}
        entry = {**inherited, **own}
    return entry


def _refusals(entry: Entry) -> Iterator[Refusal]:
    for key, inexact in (("refuse", False), ("inexact_if", True)):
        for item in entry.get(key, ()):
            yield Refusal(item["key"], item["why"], item.get("is"), "set" in item, inexact)


def _expanded(item: Any) -> Iterator[Any]:
    """An item of `skip` for every name that it stands for."""
    if isinstance(item, Mapping):
        yield from ({**item, "norm": name} for name in expand(item["norm"]))
    else:
        yield from expand(str(item))


def _skip(item: Any, layer: Rules) -> Iterator[StepRule | str]:
    """A norm or gain that the stream passes (a LayerNorm takes the mean off first), or a module that adds to it."""
    if isinstance(item, Mapping):
        yield from reversed(steps(item))
    else:
        yield item if item in layer.exact else StepRule("scale", item)
