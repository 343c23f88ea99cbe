"""What an architecture says about a checkpoint: its residual writers, and the role of every tensor."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["writer", "reader", "head", "norm", "outside"]


@dataclass(frozen=True)
class Gain:
    """The gain of the norm that follows a writer: g = offset + w, with w the stored weight [hidden].

    Attributes:
        tensor: on-disk name of w.
        offset: 1 for Gemma 2 and 3, else 0.
    """

    tensor: str
    offset: float


@dataclass(frozen=True)
class Writer:
    """A tensor whose output is added to the residual stream.

    Attributes:
        tensor: on-disk name.
        kind: embedding, position, attention, mlp or bias.
        axis: the axis of length hidden along which the direction is projected out.
        gain: of the norm between this writer and the stream, if there is one.
        layer: index of its decoder layer; None outside of layers.
    """

    tensor: str
    kind: str
    axis: int
    gain: Gain | None
    layer: int | None


@dataclass(frozen=True)
class TensorRole:
    """What a tensor is to the residual stream, and why."""

    name: str
    role: Role
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every tensor of a checkpoint accounted for.

    Attributes:
        tied: the output head shares the embedding.
        embedding: name of the token embedding. `head`: of the output head, stored or as untying would write it.
        tied_flag: dotted key of tie_word_embeddings in config.json.
        layers_prefix: on-disk name of the list of decoder layers.
        writers: as a forward pass meets them, embeddings first.
        roles: every tensor, in the checkpoint's order.
        head_copy: the head is tied and a copy of the embedding is stored for it all the same (as in Qwen3-0.6B). Where
            the head stays tied, the copy takes the embedding's edit; untied, it is what untying would write.
    """

    model_type: str
    family: str
    hidden_size: int
    num_layers: int
    tied: bool
    embedding: str
    head: str
    tied_flag: str
    layers_prefix: str
    writers: tuple[Writer, ...]
    roles: tuple[TensorRole, ...]
    head_copy: bool = False

    @property
    def edited(self) -> tuple[Writer, ...]:
        """The writers, and a stored copy of the tied head, which goes with the embedding."""
        if not self.head_copy:
            return self.writers
        axis = next(writer.axis for writer in self.writers if writer.tensor == self.embedding)
        return (*self.writers, Writer(self.head, "head copy", axis, None, None))
