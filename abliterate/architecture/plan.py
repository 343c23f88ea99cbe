"""From headers and config to a plan: every tensor accounted for, every expected tensor there, or a clear no."""

from collections.abc import Iterable, Sequence

from abliterate.architecture.account import Account, Match
from abliterate.architecture.blueprint import Blueprint, read_blueprint
from abliterate.architecture.complete import check_complete
from abliterate.architecture.entry import Entry, find_entry
from abliterate.architecture.paths import gain_path, skip_paths
from abliterate.architecture.rules import fold_numbers
from abliterate.architecture.table import load_table
from abliterate.architecture.writer import Plan, Runtime, TensorRole, Writer
from abliterate.checkpoint.files import Checkpoint
from abliterate.errors import ArchitectureError

EDITABLE = ("F64", "F32", "F16", "BF16")


def plan_architecture(
    checkpoint: Checkpoint,
    trust_remote_code: bool = False,
    entry: Entry | None = None,
    blueprint: Blueprint | None = None,
) -> Plan:
    """The plan of a checkpoint, from its headers and config.json alone.

    Args:
        trust_remote_code: run code that comes with the checkpoint.
        entry: what is known of the architecture; None looks in the table.
        blueprint: of the config; None reads it.

    Raises:
        ArchitectureError: the model type is not supported, its config rules out an edit, or a tensor is missing,
            unknown, of an unexpected shape, or stored in a dtype that cannot be edited; the message names it.
    """
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise ArchitectureError(f"{checkpoint.folder}: config.json names no model_type, so nothing is known about it")
    blueprint = blueprint or read_blueprint(checkpoint.folder, checkpoint.config, trust_remote_code)
    entry = entry or find_entry(checkpoint.config, blueprint)
    if entry is None:
        known = len(load_table().types)
        raise ArchitectureError(f"model type {model_type} is not among the {known} in the table of residual writers")
    return _Planner(checkpoint, entry, blueprint, model_type).plan()


class _Planner:
    """Puts the plan of one checkpoint together."""

    def __init__(self, checkpoint: Checkpoint, entry: Entry, blueprint: Blueprint, model_type: str) -> None:
        self._checkpoint, self._entry, self._blueprint, self._model_type = checkpoint, entry, blueprint, model_type
        self._account = Account(checkpoint.tensors, entry, blueprint, model_type)
        self._matches = list(self._account.matches())

    def plan(self) -> Plan:
        """See `plan_architecture`."""
        account, blueprint = self._account, self._blueprint
        check_complete(self._matches, blueprint, self._model_type)
        for match in self._matches:
            self._check(match)
        self._check_beyond()
        self._scopes = self._layer_scopes()
        offset = self._entry.text.gain_offset
        self._boundaries, self._join = skip_paths(self._entry.text.skip, self._scopes, self._stored, offset)
        writers = tuple(self._writer(match) for match in sorted(self._writing(), key=self._order))
        head, copied = self._head()
        return Plan(
            model_type=self._model_type,
            family=self._entry.text.name,
            hidden_size=blueprint.hidden_size,
            num_layers=len(self._scopes),
            tied=blueprint.tied,
            embedding=account.embedding,
            head=head,
            tied_flags=self._tied_flags(),
            writers=writers,
            roles=tuple(self._role(match, copied) for match in self._matches),
            runtime=self._runtime(writers),
            boundaries=self._boundaries if self._entry.text.skip else (),
            sometimes=self._sometimes(),
            inexact=self._entry.inexact,
            head_copy=copied,
            shared=tuple(sorted({(fold_numbers(a), fold_numbers(b)) for a, b in blueprint.aliases.items()})),
            untying=self._untying(head) if blueprint.tied else (),
            probed=self._entry.probed,
        )

    def _writing(self) -> Iterable[Match]:
        hidden = self._blueprint.hidden_size
        return (m for m in self._matches if m.writes and not narrow(m, hidden))

    def _check(self, match: Match) -> None:
        """A writer's shape and dtype are those that its rule says; a tensor without a rule cannot write."""
        info, hidden = match.info, self._blueprint.hidden_size
        if match.rule is None and not match.head and hidden in info.shape:
            raise self._unaccounted(match)
        rule = match.rule
        if rule is None or not match.writes:
            return
        if narrow(match, hidden):
            return
        axes = [axis for axis in rule.axes if len(info.shape) == rule.dimensions and info.shape[axis] == hidden]
        if len(axes) != 1:
            raise ArchitectureError(
                f"tensor {info.name} has shape {list(info.shape)}; it should have {rule.dimensions} dimensions, and "
                f"along axis {' or '.join(map(str, rule.axes))} alone the width of the stream, {hidden}"
            )
        if info.dtype not in EDITABLE:
            raise ArchitectureError(
                f"tensor {info.name} is stored as {info.dtype}, and only {', '.join(EDITABLE)} can be edited; convert "
                "the unquantized original"
            )

    def _check_beyond(self) -> None:
        """Layers that config.json does not count are for next-token prediction, and not those of a forged count."""
        ahead = (match for match in self._matches if match.ahead and match.layer is not None)
        numbered = {match.scope: match for match in ahead if match.rule is not None}
        beyond = self._entry.text.beyond
        for match in self._matches:
            if match.scope in numbered and beyond.find(match.info.name.removeprefix(match.scope)) is not None:
                del numbered[match.scope]
        if numbered:
            match = next(iter(numbered.values()))
            raise ArchitectureError(
                f"tensor {match.info.name} is in a layer beyond those of config.json, which is none for next-token "
                "prediction either: config.json counts too few layers"
            )

    def _unaccounted(self, match: Match) -> ArchitectureError:
        info = match.info
        return ArchitectureError(
            f"tensor {info.name} {list(info.shape)} is not accounted for in {self._model_type}: it may write to "
            "the residual stream, so no edit could be called exact"
        )

    def _layer_scopes(self) -> list[str]:
        """What stands before the names of each layer, in order."""
        scopes = {(m.list, m.layer): m.scope for m in self._matches if m.layer is not None and not m.ahead}
        return [scopes[key] for key in sorted(scopes)]

    def _stored(self, module: str) -> str | None:
        """On-disk name of a module's weight."""
        tensors = self._checkpoint.tensors
        return next((name for name in (f"{module}.weight", module) if name in tensors), None)

    def _order(self, match: Match) -> tuple[int, int, int]:
        """As a forward pass meets them: the embedding, what is beside the layers, the layers."""
        if match.info.name == self._account.embedding:
            return (-1, 0, 0)
        if match.layer is None:
            return (2 if match.ahead else 0, 0, 0)
        return (2 if match.ahead else 1, match.list, match.layer)

    def _writer(self, match: Match) -> Writer:
        rule, info = match.rule, match.info
        assert rule is not None
        axis = next(axis for axis in rule.axes if info.shape[axis] == self._blueprint.hidden_size)
        gain = gain_path(rule.gain, match.scope, self._stored, self._entry.text.gain_offset)
        skip = self._boundaries[0]
        if match.ahead:
            skip = ()
        elif match.layer is not None and self._entry.text.skip:
            skip = self._join(self._scopes.index(match.scope), rule.module)
        layer = None if match.layer is None else match.layer + sum(self._account.counts[: match.list])
        return Writer(info.name, rule.kind, axis, layer, gain, skip)

    def _sometimes(self) -> tuple[int, ...]:
        """Layers that have what the table says only images bring to life."""
        module = self._entry.text.with_images
        if module is None:
            return ()
        return tuple(
            i for i, s in enumerate(self._scopes) if any(n.startswith(f"{s}{module}.") for n in self._account.places)
        )

    def _head(self) -> tuple[str, bool]:
        """The head's name, stored or as untying would write it, and whether it is a stored copy of a tied one."""
        stored = [match.info.name for match in self._matches if match.head]
        if len(stored) > 1:
            raise ArchitectureError(f"the weights have two heads, {stored[0]} and {stored[1]}; remove one")
        if stored:
            return stored[0], self._blueprint.tied
        if self._blueprint.head is None:
            raise ArchitectureError(f"{self._blueprint.class_name} has no output head: it generates no text")
        return self._head_name(self._blueprint.head), False

    def _head_name(self, runtime: str) -> str:
        """An on-disk name that transformers reads the head from."""
        # "language_model." of "language_model.model.", in front of the head's name as well in older checkpoints
        tower = self._account.prefix.removesuffix("model.") if self._account.prefix.endswith(".model.") else ""
        names = [f"{place}{head}.weight" for head in self._entry.text.head for place in (tower, "")]
        found = self._blueprint.places([*names, runtime])
        return next((name for name in names if runtime in found[name].parameters), runtime)

    def _untying(self, head: str) -> tuple[tuple[str, str], ...] | None:
        """What to copy so that the head, and nothing else, stands for itself; see `Plan.untying`."""
        blueprint, copies = self._blueprint, []
        assert blueprint.head is not None
        stored = {name: m.info.name for m in self._matches for name in m.place.parameters}
        left = blueprint.untied()
        for alias, first in sorted(blueprint.aliases.items()):
            if alias in left or (alias in stored and first in stored):
                continue
            lone = first if alias in stored else alias
            if lone.rpartition(".")[0] != blueprint.head.rpartition(".")[0]:
                return None
            copies.append((stored[alias if lone == first else first], head if lone == blueprint.head else lone))
        return tuple(copies)

    def _tied_flags(self) -> tuple[str, ...]:
        """Where config.json says that the head is tied, or should say that it is not."""
        towers = [key for key, value in self._checkpoint.config.items() if isinstance(value, dict)]
        inner = [
            f"{key}.tie_word_embeddings" for key in towers if "tie_word_embeddings" in self._checkpoint.config[key]
        ]
        return ("tie_word_embeddings", *inner)

    def _role(self, match: Match, copied: bool) -> TensorRole:
        name = match.info.name
        if match.head and copied:
            why = "stored copy of the tied embedding; edited with it unless the head is untied"
            return TensorRole(name, "head", why)
        if match.head:
            return TensorRole(name, "head", "reads the stream after the final norm")
        if match.rule is None:
            return TensorRole(name, "unknown", "not in the table; nothing in it is as wide as the stream")
        if narrow(match, self._blueprint.hidden_size):
            return TensorRole(name, "inside", "narrower than the stream, which it reaches through another tensor")
        unused = "" if match.place.parameters else " (not used by transformers)"
        return TensorRole(name, match.rule.role, match.rule.reason + unused)

    def _runtime(self, writers: Sequence[Writer]) -> Runtime:
        places = self._account.places
        passed = [step for writer in writers for step in (*writer.gain, *writer.skip)]
        steps = {step.tensor for step in (*passed, *self._boundaries[0]) if step.tensor}
        return Runtime(
            self._blueprint.class_name,
            tuple(self._layer_modules()),
            {w.tensor: places[w.tensor].parameters[0] for w in writers if places[w.tensor].parameters},
            {name: places[name].parameters[0] for name in steps if places[name].parameters},
        )

    def _layer_modules(self) -> list[str]:
        """Run-time names of the decoder layers, in order."""
        found: dict[tuple[int, int], str] = {}
        for match in self._matches:
            if match.layer is not None and not match.ahead and match.place.parameters:
                found.setdefault((match.list, match.layer), _through_number(match.place.parameters[0]))
        return [found[key] for key in sorted(found)]


def narrow(match: Match, hidden: int) -> bool:
    """Whether a tensor that usually writes is too narrow here: a narrow embedding, experts in a latent space.

    Only where its shape is what transformers expects, or the table says that it may be.
    """
    rule, info = match.rule, match.info
    if rule is None or rule.role != "writer" or len(info.shape) != rule.dimensions:
        return False
    along = [info.shape[axis] for axis in rule.axes]
    return hidden not in along if rule.narrow else hidden not in info.shape and bool(match.place.parameters)


def _through_number(name: str) -> str:
    """A name up to its first number."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: first + 1])
