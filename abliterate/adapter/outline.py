"""An adapter before it is made: where its factors will be, of which rank, and how large."""

from dataclasses import dataclass

from abliterate.adapter.places import Kind, LeftOut, Placed
from abliterate.architecture.writer import Plan
from abliterate.checkpoint.files import Checkpoint

FACTOR_BYTES = 4


@dataclass(frozen=True)
class Part:
    """The difference of one tensor.

    Attributes:
        module: of the running model. `kind`: see `Target`.
        bytes: of its factors, float32; of a bias as it is stored.
    """

    tensor: str
    module: str
    kind: Kind
    bytes: int


@dataclass(frozen=True)
class Outline:
    """What an adapter will hold.

    Attributes:
        rank: of every module.
        left_out: what PEFT cannot hold, and why.
    """

    rank: int
    parts: tuple[Part, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def bytes(self) -> int:
        """Of all factors."""
        return sum(part.bytes for part in self.parts)


def outline(placed: Placed, checkpoint: Checkpoint, plan: Plan, rank: int) -> Outline:
    """Sizes the factors of every tensor.

    Args:
        rank: how many directions every writer loses.
    """
    parts = []
    for target in placed.targets:
        for writer in target.writers:
            info = checkpoint.tensors[writer.tensor]
            experts = info.shape[0] if len(info.shape) == 3 else 1
            others = info.numel // plan.hidden_size
            factors = FACTOR_BYTES * rank * (others + experts * plan.hidden_size)
            size = info.nbytes if target.kind == "bias" else factors
            parts.append(Part(writer.tensor, target.module, target.kind, size))
    return Outline(rank, tuple(parts), placed.left_out)
