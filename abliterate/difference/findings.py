"""What the kind of an edit is judged by."""

from collections.abc import Sequence
from dataclasses import dataclass

from abliterate.difference.pairs import Pairing
from abliterate.difference.shared import Shared
from abliterate.difference.tensors import TensorDifference


@dataclass(frozen=True)
class Findings:
    """What there is to judge by.

    Attributes:
        shared: of changed residual writers; None where there are none, or they have no width in common.
    """

    pairing: Pairing
    tensors: Sequence[TensorDifference]
    shared: Shared | None

    @property
    def changed(self) -> list[TensorDifference]:
        """Tensors with other values."""
        return [tensor for tensor in self.tensors if tensor.differs]

    @property
    def matrices(self) -> list[TensorDifference]:
        """Changed tensors that have a spectrum."""
        return [tensor for tensor in self.changed if tensor.state in ("low-rank", "full-rank", "rounding")]

    @property
    def vectors(self) -> list[TensorDifference]:
        """Changed tensors of one dimension."""
        return [tensor for tensor in self.changed if tensor.state == "vector"]

    @property
    def complete(self) -> bool:
        """Whether both have the same tensors in the same shapes; a head that was tied or untied does not count."""
        pairing = self.pairing
        return not (pairing.missing or pairing.extra or pairing.reshaped or any(p.resized for p in pairing.pairs))
