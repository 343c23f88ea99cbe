"""What an edit takes out, where, and how strongly: directions, and a strength for each layer and kind of writer."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abliterate.architecture.writer import Writer
from abliterate.errors import EditError

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, Part] = ("attention", "mlp")
ORTHONORMAL = 1e-5


@dataclass(frozen=True)
class Removal:
    """What one writer loses.

    Attributes:
        basis: which of the cut's. `strength`: 1 removes it whole, less a share of it, less than 0 adds to it.
    """

    basis: int
    strength: float


@dataclass(frozen=True)
class Cut:
    """What all writers lose.

    Attributes:
        bases: [n, k, hidden] fp32, k orthonormal directions each, as they are at the end of the stream; a single one
            may have any length.
        layers: for each decoder layer, which basis its writers lose.
        strengths: [layers, 2] fp64, of what writes as attention (or another mixer of tokens), and as MLP.
        stem: strength for writers outside of layers, embeddings above all, which lose the first basis.
        keep_norms: columns of every matrix keep their length.
    """

    bases: Tensor
    layers: tuple[int, ...]
    strengths: Tensor
    stem: float = 1.0
    keep_norms: bool = False

    def __post_init__(self) -> None:
        """Raises:
        EditError: the parts do not fit one another.
        """
        count = len(self.layers)
        fits = self.bases.dim() == 3 and tuple(self.strengths.shape) == (count, len(PARTS))
        if not fits or not all(0 <= index < len(self.bases) for index in self.layers):
            raise EditError("an edit's directions, layers and strengths do not fit one another")
        if not bool(torch.isfinite(self.bases).all() and torch.isfinite(self.strengths).all()):
            raise EditError("an edit's directions or strengths are not finite")
        gram = self.bases.double() @ self.bases.double().mT
        # the length of a single one makes no difference
        if gram.shape[-1] > 1 and float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).abs().max()) > ORTHONORMAL:
            raise EditError("the directions of an edit are not orthonormal")

    @classmethod
    def uniform(cls, basis: Tensor, layers: int, strength: float = 1.0, keep_norms: bool = False) -> "Cut":
        """The same everywhere. `basis`: [hidden] or [k, hidden]."""
        bases = basis.float().reshape(1, -1, basis.shape[-1])
        whole = torch.full((layers, len(PARTS)), strength, dtype=torch.float64)
        return cls(bases, (0,) * layers, whole, strength, keep_norms)

    @property
    def hidden_size(self) -> int:
        """Width of the stream."""
        return self.bases.shape[-1]

    @property
    def uniform_strength(self) -> float | None:
        """The strength, where all writers lose the same basis with the same one; else None."""
        same = len(self.bases) == 1 and bool((self.strengths == self.stem).all())
        return self.stem if same else None

    @property
    def exact(self) -> bool:
        """Whether the basis is to be gone from the whole stream."""
        return self.uniform_strength == 1.0

    @property
    def leaves(self) -> str | None:
        """What the edit leaves on purpose, in words; None where nothing."""
        if self.exact:
            return None
        if self.uniform_strength is not None:
            said = "adds to" if self.uniform_strength < 0 else "leaves part of"
            return f"strength {self.uniform_strength:g} {said} the direction on purpose"
        least, most = float(self.strengths.min()), float(self.strengths.max())
        strengths = f"strength {least:g}" if least == most else f"strengths from {least:.2g} to {most:.2g}"
        own = "each layer loses a direction of its own" if len(self.bases) > 1 else "layers lose unequal shares"
        return f"{own} on purpose, with {strengths}"

    @property
    def simple(self) -> bool:
        """Whether one direction and one strength say all of it."""
        return self.uniform_strength is not None and self.bases.shape[1] == 1 and not self.keep_norms

    @property
    def main(self) -> Tensor:
        """The basis that stands for the edit where one is asked for, [k, hidden]."""
        return self.bases[0]

    def removal(self, writer: Writer, part: Part) -> Removal:
        """What a writer loses; layers for next-token prediction, behind the last, lose what the last one does."""
        if writer.layer is None:
            return Removal(0, self.stem)
        layer = min(writer.layer, len(self.layers) - 1)
        return Removal(self.layers[layer], float(self.strengths[layer, PARTS.index(part)]))


def part_of(writer: Writer, writers: Collection[Writer]) -> Part:
    """Whether a writer counts as attention or as MLP: a bias as the matrix that it belongs to."""
    if writer.kind in ("attention", "mixer"):
        return "attention"
    if writer.kind == "bias":
        beside = writer.tensor.rpartition(".")[0]
        for other in writers:
            if other.kind != "bias" and other.layer == writer.layer and other.tensor.rpartition(".")[0] == beside:
                return part_of(other, ())
    return "mlp"


def orthonormal(vectors: Tensor, least: float = 1e-4) -> Tensor:
    """An orthonormal basis [k, hidden] fp32 of the span, the first vector first; those that add nothing are left out.

    Args:
        vectors: [n, hidden].
        least: share of a vector's length that must stand apart from those before it.

    Raises:
        EditError: there is nothing to span.
    """
    found: list[Tensor] = []
    for vector in vectors.double():
        left, size = vector, float(vector.norm())
        for _ in range(2):  # once more, against what rounding leaves
            for other in found:
                left = left - (left @ other) * other
        if size > 0 and float(left.norm()) > least * size:
            found.append(left / left.norm())
    if not found:
        raise EditError("the directions of an edit are zero")
    return torch.stack(found).float()
