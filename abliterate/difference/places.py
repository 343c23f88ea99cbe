"""What every tensor is to the residual stream: by the plan where the architecture is known, else by its shape."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from abliterate.architecture.covector import gain_along
from abliterate.architecture.writer import Plan
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.read import read_tensor

WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "hidden_dim")
"""Keys of config.json that say how wide the stream is."""
OUTPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "wo", "w2", "fc2", "dense_4h_to_h", "fc_out")
"""What the modules that write to the stream are mostly called; only asked where a square shape leaves it open."""
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings", "embedding")


@dataclass(frozen=True)
class Place:
    """What a tensor is to the stream.

    Attributes:
        role: embedding, writer, reader, head, norm, or other. `axis`: the stream's; 0 where it has none.
        kind: of a writer: embedding, attention, mlp, ... `layer`: its decoder layer, if any.
        gain: of norms between it and the stream [hidden] fp64; None where there is none.
    """

    role: str
    axis: int = 0
    kind: str | None = None
    layer: int | None = None
    gain: Tensor | None = None


@dataclass(frozen=True)
class Places:
    """Those of all tensors of the base.

    Attributes:
        hidden_size: width of the stream; None where it is not known.
        embedding, head: names; None where there is none, or it is not known.
        plan: that they are from; None where shapes had to do.
    """

    by_name: Mapping[str, Place]
    hidden_size: int | None
    embedding: str | None
    head: str | None
    plan: Plan | None

    def of(self, name: str) -> Place:
        """Of any tensor."""
        return self.by_name.get(name, Place("other"))


def places_by_plan(checkpoint: Checkpoint, plan: Plan) -> Places:
    """What the plan says."""
    found = {role.name: _by_role(checkpoint, role.name, role.role, plan.hidden_size) for role in plan.roles}
    for writer in plan.writers:
        role = "embedding" if writer.tensor == plan.embedding else "writer"
        gain = gain_along(writer.gain, partial(_read, checkpoint))
        found[writer.tensor] = Place(role, writer.axis, writer.kind, writer.layer, gain)
    return Places(found, plan.hidden_size, plan.embedding, plan.head, plan)


def _by_role(checkpoint: Checkpoint, name: str, role: str, hidden: int) -> Place:
    shape = checkpoint.tensors[name].shape
    axes = [axis for axis, size in enumerate(shape) if size == hidden]
    known = role if role in ("reader", "head", "norm") else "other"
    # what reads has the stream on its other side
    return Place(known, axes[-1] if axes and role in ("reader", "head") and len(shape) > 1 else 0)


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    return read_tensor(checkpoint.shard_of(name), checkpoint.tensors[name])


def places_by_shape(checkpoint: Checkpoint) -> Places:
    """A guess from names and shapes, for models of an architecture that is not known."""
    hidden = _width(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    embedding = next((n for n in shapes if _module(n) in EMBEDDINGS and len(shapes[n]) == 2), None)
    head = next((name for name in shapes if _module(name) in ("lm_head", "output", "embed_out")), None)
    found = {name: _guess(name, shape, hidden) for name, shape in shapes.items()}
    if embedding is not None:
        found[embedding] = Place("embedding", 1, "embedding")
    if head is not None:
        found[head] = Place("head", 1 if len(shapes[head]) > 1 else 0)
    return Places(found, hidden, embedding, head, None)


def _width(checkpoint: Checkpoint) -> int | None:
    """By config.json, else the size that most matrices have on a side."""
    parts = [checkpoint.config, *(value for value in checkpoint.config.values() if isinstance(value, dict))]
    sides = Counter(size for info in checkpoint.tensors.values() if len(info.shape) == 2 for size in set(info.shape))
    for part in parts:
        for key in WIDTHS:
            if isinstance(part.get(key), int) and part[key] in sides:
                return int(part[key])
    return sides.most_common(1)[0][0] if sides else None


def _guess(name: str, shape: tuple[int, ...], hidden: int | None) -> Place:
    axes = [axis for axis, size in enumerate(shape) if size == hidden]
    if len(shape) < 2:
        return Place("norm" if "norm" in name.lower() else "other")
    if not axes:
        return Place("other")
    writes = _module(name) in OUTPUTS if len(axes) > 1 else axes[0] == 0
    return Place("writer", axes[0], "writer") if writes else Place("reader", axes[-1])


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
