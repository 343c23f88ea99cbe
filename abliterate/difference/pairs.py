"""Which tensor of one checkpoint stands beside which of the other, whatever shards, order and prefixes they have."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import TensorInfo

PREFIXES = ("", "model.", "language_model.", "model.language_model.", "language_model.model.", "transformer.")
"""What programs put before all names or take away, longest match last."""
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Pair:
    """Two tensors to compare.

    Attributes:
        name: in the base. `other`: in the edited checkpoint.
        base, edited: where they are.
        rows: how many along axis 0 both have; less than one of them has where a vocabulary was resized.
        head: the edited one is an output head of its own, where the base uses its embedding for that.
    """

    name: str
    other: str
    base: TensorInfo
    edited: TensorInfo
    rows: int
    head: bool = False

    @property
    def resized(self) -> bool:
        """Whether one has more rows than the other."""
        return self.base.shape != self.edited.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is compared."""
        return (self.rows, *self.base.shape[1:]) if self.base.shape else ()

    @property
    def nbytes(self) -> int:
        """Of both tensors, as far as they are compared."""
        return sum(
            info.nbytes * self.rows // max(1, info.shape[0]) if info.shape else info.nbytes
            for info in (self.base, self.edited)
        )


@dataclass(frozen=True)
class Reshaped:
    """A tensor that both have, of shapes that cannot be compared."""

    name: str
    base: tuple[int, ...]
    edited: tuple[int, ...]


@dataclass(frozen=True)
class Pairing:
    """What two checkpoints have of each other.

    Attributes:
        pairs: in the base's order.
        missing: tensors of the base that the edited checkpoint lacks. `extra`: the other way round.
        reshaped: in both, not comparable.
        renamed: the prefix of the base's names and the edited one's, where they differ.
        head: what became of a tied head: `untied` (the edited checkpoint stores one of its own, here paired with the
            base's embedding), `tied` (the base's own head, paired with the edited embedding), or None.
    """

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: tuple[Reshaped, ...]
    renamed: tuple[str, str] | None
    head: str | None

    @property
    def nbytes(self) -> int:
        """Of everything to read."""
        return sum(pair.nbytes for pair in self.pairs)


def pair_tensors(base: Checkpoint, edited: Checkpoint, embedding: str | None, head: str | None = None) -> Pairing:
    """Pairs tensors by name.

    Args:
        embedding: name of the base's token embedding; None where it is not known. `head`: of its output head.
    """
    prefixes = _prefixes(base.tensors, edited.tensors)
    names = _renamed(base.tensors, edited.tensors, prefixes)
    both = [(name, names[name]) for name in base.tensors if name in names]
    lone = [name for name in base.tensors if name not in names]
    extra = [name for name in edited.tensors if name not in set(names.values())]
    link, became = _heads(base, edited, embedding, head or HEAD, (lone, extra), names)
    pairs, reshaped = [], []
    for name, other in (*both, *link):
        pair = _pair(name, other, base.tensors[name], edited.tensors[other])
        if pair is None:
            reshaped.append(Reshaped(name, base.tensors[name].shape, edited.tensors[other].shape))
        else:
            pairs.append(replace(pair, head=became == "untied" and (name, other) in link))
    linked = {name for pair in link for name in pair}
    missing = tuple(name for name in lone if name not in linked)
    return Pairing(
        tuple(pairs),
        missing,
        tuple(name for name in extra if name not in linked),
        tuple(reshaped),
        prefixes if prefixes != ("", "") else None,
        became,
    )


def _prefixes(base: Collection[str], edited: Collection[str]) -> tuple[str, str]:
    """The pair of prefixes under which most names meet; none where that is as good."""
    stripped = {
        prefix: {name.removeprefix(prefix) for name in edited if name.startswith(prefix)} for prefix in PREFIXES
    }

    def met(own: str, other: str) -> int:
        return len({name.removeprefix(own) for name in base if name.startswith(own)} & stripped[other])

    plain = met("", "")
    found = max(((own, other) for own in PREFIXES for other in PREFIXES), key=lambda pair: met(*pair))
    return found if 2 * plain < met(*found) else ("", "")


def _renamed(base: Collection[str], edited: Collection[str], prefixes: tuple[str, str]) -> dict[str, str]:
    """The edited checkpoint's name for each of the base's that it has."""
    own, other = prefixes
    found = {}
    for name in base:
        twin = other + name.removeprefix(own) if name.startswith(own) else name
        twin = twin if twin in edited else name
        if twin in edited:
            found[name] = twin
    return found


def _heads(
    base: Checkpoint,
    edited: Checkpoint,
    embedding: str | None,
    head: str,
    lone: tuple[Collection[str], Collection[str]],
    names: Mapping[str, str],
) -> tuple[list[tuple[str, str]], str | None]:
    """Pairs a head that only one stores with the embedding that the other uses for it."""
    if embedding is None or embedding not in names:
        return [], None
    shared = names[embedding]
    stored = next((name for name in lone[1] if name.removeprefix("model.") in (head, HEAD)), None)
    if stored is not None and base.tensors[embedding].shape[1:] == edited.tensors[stored].shape[1:]:
        return [(embedding, stored)], "untied"
    if head in lone[0] and base.tensors[head].shape[1:] == edited.tensors[shared].shape[1:]:
        return [(head, shared)], "tied"
    return [], None


def _pair(name: str, other: str, base: TensorInfo, edited: TensorInfo) -> Pair | None:
    """None where shapes differ by more than rows of a matrix."""
    if base.shape == edited.shape:
        return Pair(name, other, base, edited, base.shape[0] if base.shape else 1)
    if len(base.shape) == len(edited.shape) == 2 and base.shape[1] == edited.shape[1]:
        return Pair(name, other, base, edited, min(base.shape[0], edited.shape[0]))
    return None
