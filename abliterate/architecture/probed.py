"""An entry of the table made from what the gradient probe found on a tiny twin, in the table's own format."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.architecture.blueprint import Blueprint, Place
from abliterate.architecture.probe import Found, Probe
from abliterate.architecture.rules import fold_numbers
from abliterate.architecture.writer import Step
from abliterate.errors import ArchitectureError, RefusedError

Shapes = Mapping[str, tuple[int, ...]]


def entry_of(
    model_type: str, probe: Probe, stored: Shapes, twin: Blueprint, unused: Collection[str] = (), inexact: bool = False
) -> dict[str, Any]:
    """What families/*.yaml would say of this type, under its name.

    Args:
        stored: shapes of the twin's tensors by their on-disk names.
        twin: its blueprint.
        unused: run-time names of parameters that the probe's tokens did not bring to use.
        inexact: also where no edit of what was found is exact.

    Raises:
        RefusedError: no edit of what was found is exact.
        ArchitectureError: it cannot be said in an entry.
    """
    if not probe.exact and not inexact:
        what = ", ".join(list(probe.blocked)[:3]) or "something that gradients do not see"
        raise RefusedError(
            f"model type {model_type} is not in the table, and no direction is exact on a tiny twin of it",
            f"{what} writes to the stream and cannot be edited exactly",
        )
    if probe.idle:
        raise ArchitectureError(
            f"model type {model_type} is not in the table, and tokens alone do not run its {probe.idle[0]}: only an "
            "entry written by hand can say what that writes"
        )
    if probe.skip is not None and not inexact:
        raise RefusedError(
            f"model type {model_type} is not in the table, and only an entry written by hand can say how its stream "
            "passes gains",
            "the stream itself passes gains, which turn the direction from layer to layer",
        )
    if not inexact:
        _check_used(model_type, probe, twin, unused)
    return _Writing(probe, stored, twin, inexact).entry(model_type)


def _check_used(model_type: str, probe: Probe, twin: Blueprint, unused: Collection[str]) -> None:
    """Of what is as wide as the stream, everything was in use, or is as something that was (experts)."""
    found = {found.parameter for found in probe.found}
    used = {fold_numbers(name) for name in twin.shapes if name not in unused}
    for name in sorted(unused):
        wide = twin.hidden_size in twin.shapes.get(name, ())
        if wide and name not in found and fold_numbers(name) not in used:
            raise ArchitectureError(
                f"model type {model_type} is not in the table, and tokens alone do not bring {name} to use: only an "
                "entry written by hand can say what that writes"
            )


@dataclass(frozen=True)
class _Named:
    """A tensor of the twin by its on-disk name, cut where a table cuts it: a layer's are named below it."""

    shape: tuple[int, ...]
    place: Place
    in_layer: bool
    name: str

    @property
    def module(self) -> str:
        """As the table names it: without .weight and .bias, numbers as `*`."""
        return fold_numbers(self.name.removesuffix(".weight").removesuffix(".bias"))

    def called(self, mixed: Collection[str]) -> str:
        """The same, with its own numbers where they matter."""
        return self.name.removesuffix(".weight").removesuffix(".bias") if self.module in mixed else self.module


class _Writing:
    """Puts one entry together."""

    def __init__(self, probe: Probe, stored: Shapes, twin: Blueprint, inexact: bool) -> None:
        self._probe, self._twin, self._stored, self._inexact = probe, twin, stored, inexact
        self._places = twin.places(stored)
        self._found = {found.parameter: found for found in probe.found}
        self._embedding = next((n for n, place in self._places.items() if twin.embedding in place.parameters), "")
        if not self._embedding:
            raise ArchitectureError(f"no stored tensor is the token embedding {twin.embedding}")
        self._lists = self._layer_lists()
        module = self._embedding.removesuffix(".weight")
        self._prefix = _common([module, *(f"{name}.0" for name in self._lists)])

    def entry(self, model_type: str) -> dict[str, Any]:
        """See `entry_of`."""
        body = [name for name in self._stored if not self._is_head(name)]
        named = [self._named(name) for name in body if name.startswith(self._prefix)]
        beside = [name for name in body if not name.startswith(self._prefix)]
        gains, offsets = self._gains([n for n in named if self._writer(n)])
        entry: dict[str, Any] = {"types": [model_type]}
        layers = [name.removeprefix(self._prefix) for name in self._lists]
        entry |= {} if layers == ["layers"] else {"layers": layers[0] if len(layers) == 1 else layers}
        embedding = self._embedding.removesuffix(".weight").removeprefix(self._prefix)
        entry |= {} if embedding == "embed_tokens" else {"embedding": embedding}
        entry |= {} if self._head() in (None, "lm_head") else {"head": self._head()}
        entry["stem"] = [self._part([n for n in named if not n.in_layer], gains)]
        entry["layer"] = [self._part([n for n in named if n.in_layer], gains)]
        entry |= {"gains": gains} if gains else {}
        entry |= {"gain_offset": offsets.pop()} if offsets - {0.0} else {}
        return entry | ({"outside": self._outside(beside)} if beside else {})

    def _layer_lists(self) -> list[str]:
        """On-disk names of the lists of decoder layers."""
        found: dict[str, None] = {}
        for layer in dict.fromkeys(self._probe.layers):
            for name, place in self._places.items():
                if any(parameter.startswith(f"{layer}.") for parameter in place.parameters):
                    found[name[: name.index(next(p for p in name.split(".") if p.isdecimal())) - 1]] = None
                    break
        return list(found)

    def _named(self, name: str) -> _Named:
        rest = name.removeprefix(self._prefix)
        for layers in self._lists:
            start = f"{layers.removeprefix(self._prefix)}."
            if rest.startswith(start) and rest.removeprefix(start).partition(".")[0].isdecimal():
                inner = rest.removeprefix(start).partition(".")[2]
                return _Named(self._stored[name], self._places[name], True, inner)
        return _Named(self._stored[name], self._places[name], False, rest)

    def _is_head(self, name: str) -> bool:
        head = self._twin.head
        return head is not None and head in self._places[name].parameters and name != self._embedding

    def _head(self) -> str | None:
        return next((n.removesuffix(".weight") for n in self._stored if self._is_head(n)), None)

    def _writer(self, named: _Named) -> Found | None:
        return next((self._found[p] for p in named.place.parameters if p in self._found), None)

    def _gains(self, writers: Sequence[_Named]) -> tuple[dict[str, Any], set[float]]:
        """What stands between writers and the stream, by their names in the table; and the norms' offsets."""
        gains: dict[str, Any] = {}
        offsets: set[float] = set()
        disk = {parameter: self._named(name) for name, place in self._places.items() for parameter in place.parameters}
        for named in writers:
            found = self._writer(named)
            assert found is not None
            if found.through is None and self._inexact:
                continue
            if found.through is None:
                raise ArchitectureError(
                    f"what stands between {named.name} and the stream is no norm, gain or convolution that is known"
                )
            steps = [step for step in found.through if step.tensor or step.kind == "center"]
            if steps:
                gains.setdefault(named.module, _gain(steps, disk))
            offsets |= {step.offset for step in steps if step.kind == "scale"}
        if len(offsets) > 1:
            raise ArchitectureError(f"some norms scale by their weight and others by 1 + weight: {sorted(offsets)}")
        return gains, offsets

    def _part(self, tensors: Sequence[_Named], gains: Mapping[str, Any]) -> dict[str, Any]:
        """One part that names everything in one place."""
        part: dict[str, Any] = {"writes": {}, "reads": [], "norms": [], "inside": []}
        between = {norm for gain in gains.values() for norm in _norms(gain)}
        # A module is what its weight is, not its bias.
        tensors = sorted(tensors, key=lambda named: (-len(named.shape), named.name.endswith(".bias")))
        mixed = self._mixed(tensors)
        for named in tensors:
            if self._writer(named) is None or named.module in between:
                continue
            if named.name.endswith(".bias") and named.called(mixed) not in part["writes"]:
                # of a norm in the stream, whose weight does not write
                part["writes"][f"{named.called(mixed)}.bias"] = {"kind": "bias", "axis": 0, "of": 1}
            else:
                part["writes"].setdefault(named.called(mixed), self._facts(named))
        for named in tensors:
            if not any(named.called(mixed) in modules for modules in part.values()):
                part[self._kind_of_reader(named, between)].append(named.called(mixed))
        return {key: value for key, value in part.items() if value}

    def _mixed(self, tensors: Sequence[_Named]) -> set[str]:
        """Modules whose number tells one that writes from one that does not (a sequence of layers, not of experts)."""
        matrices = [named for named in tensors if len(named.shape) > 1]
        writing = {named.module for named in matrices if self._writer(named) is not None}
        return writing & {named.module for named in matrices if self._writer(named) is None}

    def _facts(self, named: _Named) -> Any:
        """A writer's kind, and its axis where it is not that of a linear weight."""
        axis, dimensions = self._axis(named), len(named.shape)
        if (axis, dimensions) == (0, 2) or named.name.endswith(".bias"):
            return _kind(named)
        return {"kind": _kind(named), "axis": axis} | ({} if dimensions == 2 else {"of": dimensions})

    def _axis(self, named: _Named) -> int:
        """The hidden axis as stored; where the tensor is fused or turned on loading, by its length alone."""
        found = self._writer(named)
        assert found is not None
        if not named.place.converted:
            return found.axis
        axes = [axis for axis, size in enumerate(named.shape) if size == self._twin.hidden_size]
        if len(axes) != 1:
            raise ArchitectureError(f"the hidden axis of {named.name} {list(named.shape)} cannot be told by its length")
        return axes[0]

    def _kind_of_reader(self, named: _Named, between: set[str]) -> str:
        if named.module in between:
            return "norms"
        if self._twin.hidden_size not in named.shape:
            return "inside"
        return "norms" if len(named.shape) == 1 else "reads"

    def _outside(self, names: Sequence[str]) -> list[str]:
        """What is beside the decoder; of towers, which tokens do not run, nothing may be as wide as the stream."""
        config = self._twin.model.config
        wide = [name for name in names if self._twin.hidden_size in self._stored[name]]
        if wide and config.get_text_config(decoder=True) is not config:
            raise ArchitectureError(
                f"{wide[0]} is as wide as the stream and outside of the text decoder, where tokens alone do not reach: "
                "only an entry written by hand can say whether it writes"
            )
        return list(dict.fromkeys(fold_numbers(name).partition(".")[0] for name in names))


def _gain(steps: Sequence[Step], disk: Mapping[str, _Named]) -> Any:
    """Steps as the table writes them."""
    items: list[Any] = []
    for step in steps:
        if step.tensor is None:
            if not items or not isinstance(items[-1], str):
                raise ArchitectureError("a mean over channels is taken off where no norm is known")
            items[-1] = {"norm": items[-1], "center": True}
        else:
            items.append({"taps": disk[step.tensor].module} if step.kind == "taps" else disk[step.tensor].module)
    return items[0] if len(items) == 1 else items


def _norms(gain: Any) -> Iterator[str]:
    for item in gain if isinstance(gain, list) else [gain]:
        yield item if isinstance(item, str) else item.get("norm", item.get("taps"))


def _kind(named: _Named) -> str:
    """A word for people; nothing depends on it."""
    if not named.in_layer:
        return "position" if "pos" in named.module or "wpe" in named.module else "embedding"
    if any(word in named.module for word in ("mamba", "linear", "conv", "mixer", "recurrent", "ssm")):
        return "mixer"
    return "attention" if "att" in named.module else "mlp"


def _common(names: Sequence[str]) -> str:
    """The dotted prefix, with its last dot, that names share."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)
