"""What an architecture says about a checkpoint: its residual writers, and the role of every tensor."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["writer", "reader", "head", "norm", "inside", "outside", "unknown"]


@dataclass(frozen=True)
class Step:
    """A linear map that a writer's output, or the stream itself, passes on its way.

    Attributes:
        kind: scale: by g = offset + w, with w the stored weight [hidden] (a norm's gain, its denominator left out);
            center: less the mean over channels (LayerNorm); taps: a depthwise convolution over tokens, the stored
            weight [hidden, 1, taps], added to its own input.
        tensor: on-disk name of w; None for center.
        offset: what is added to w: 1 for Gemma 2 and 3, else 0.
    """

    kind: Literal["scale", "center", "taps"]
    tensor: str | None = None
    offset: float = 0.0


Path = tuple[Step, ...]
"""Steps in the order in which a covector is pulled back through them: the one nearest to the stream's end first."""


@dataclass(frozen=True)
class Writer:
    """A tensor whose output is added to the residual stream.

    Attributes:
        tensor: on-disk name.
        kind: embedding, position, attention, mlp, mixer, projector or bias.
        axis: the axis of length hidden along which the direction is projected out.
        layer: index of its decoder layer; None outside of layers.
        gain: what stands between its output and the stream.
        skip: what the stream passes from there to its end, where the skip path itself has gains (DESIGN 4).
    """

    tensor: str
    kind: str
    axis: int
    layer: int | None
    gain: Path = ()
    skip: Path = ()


@dataclass(frozen=True)
class TensorRole:
    """What a tensor is to the residual stream, and why."""

    name: str
    role: Role
    reason: str


def layer_of(parameter: str, layers: Collection[str]) -> str | None:
    """Of modules that are decoder layers, by name, the outermost that a parameter lies in; None where it is in none."""
    end = parameter.find(".")
    while end >= 0:
        if parameter[:end] in layers:
            return parameter[:end]
        end = parameter.find(".", end + 1)
    return None


@dataclass(frozen=True)
class Runtime:
    """Where transformers has what the plan names.

    Attributes:
        class_name: of the model.
        layers: names of the modules that are decoder layers, in order.
        writers: for each writer's tensor, the parameter that it goes into; not in it, where transformers ignores it.
        steps: the same for the tensors of gains.
    """

    class_name: str
    layers: tuple[str, ...]
    writers: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Every tensor of a checkpoint accounted for.

    Attributes:
        family: name of the entry in the table. `probed`: it was found by gradients on a tiny twin, not in the table.
        tied: the output head shares the embedding.
        embedding: name of the token embedding. `head`: of the output head, stored or as untying would write it.
        tied_flags: dotted keys of config.json that untying sets to false.
        writers: embeddings first, then what is beside the layers, then layer by layer.
        roles: every tensor, in the checkpoint's order.
        boundaries: for the input of each layer and, last, the final norm's: what the stream passes from there to its
            end; empty where nothing but additions stands on the skip path.
        sometimes: numbers of layers that only run when there is an image.
        inexact: why no direction is exact on this architecture; None where one is.
        shared: run-time names that stand for one parameter, numbers as `*`.
        untying: tensors to copy, and the names of their copies, so that the head is no longer tied; None where that
            would take other shared tensors apart.
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
    tied_flags: tuple[str, ...]
    writers: tuple[Writer, ...]
    roles: tuple[TensorRole, ...]
    runtime: Runtime
    boundaries: tuple[Path, ...] = ()
    sometimes: tuple[int, ...] = ()
    inexact: str | None = None
    head_copy: bool = False
    shared: tuple[tuple[str, str], ...] = ()
    untying: tuple[tuple[str, str], ...] | None = ()
    probed: bool = False

    @property
    def sees(self) -> bool:
        """Whether pictures or sounds can bring something into the stream."""
        bring = (w for w in self.writers if w.kind == "projector" and w.layer is None)
        return bool(self.sometimes) or any(writer.tensor in self.runtime.writers for writer in bring)

    @property
    def shares_edit(self) -> bool:
        """Whether the head takes the embedding's edit, unless it is untied first."""
        return self.tied and self.embedding_writer is not None

    @property
    def edited(self) -> tuple[Writer, ...]:
        """The writers, and a stored copy of the tied head, which goes with the embedding."""
        first = self.embedding_writer
        if not self.head_copy or first is None:
            return self.writers
        return (*self.writers, Writer(self.head, "head copy", first.axis, None, first.gain, first.skip))

    @property
    def embedding_writer(self) -> Writer | None:
        """The token embedding; None where it is narrower than the stream, so that another tensor writes for it."""
        return next((writer for writer in self.writers if writer.tensor == self.embedding), None)
