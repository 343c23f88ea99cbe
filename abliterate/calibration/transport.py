"""The direction at other places of the stream, where the skip path has gains that turn it on its way (DESIGN 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from abliterate.architecture.covector import ReadTensor, gain_of, pull_back
from abliterate.architecture.writer import Path

_TINY = 1e-6
"""Of a gain's root mean square: what a channel is scaled by less than that is not scaled back."""


class Transport:
    """Takes directions from the end of the stream to its writers, and from a layer's input to the end.

    Args:
        writers: what the stream passes from where each writing module adds to it to its end.
        boundaries: the same from each layer's input.
        read: stored tensors by their on-disk names.
    """

    def __init__(self, writers: Sequence[Path], boundaries: Sequence[Path], read: ReadTensor) -> None:
        self._writers, self._boundaries, self._read = writers, boundaries, read

    def at_writer(self, index: int, directions: Tensor) -> Tensor:
        """Directions [rows, hidden] at the end of the stream, pulled back to a writer; rows of zeros stay."""
        given = directions.double().cpu()
        real = given.norm(dim=-1) > 0
        pulled = torch.zeros_like(given)
        if bool(real.any()):
            pulled[real] = pull_back(given[real], self._writers[index], self._read)
        return pulled.to(directions.device, directions.dtype)

    def at_end(self, layer: int, vector: Tensor) -> Tensor:
        """The direction [hidden] that, pulled back to a layer's input, is this one there, up to its length.

        A LayerNorm on the way takes off the mean over channels, which a direction behind it therefore cannot have.
        """
        found, left = vector.double(), list(reversed(self._boundaries[layer]))
        for number, step in enumerate(left):
            if step.tensor is None:
                found = found - found.mean()
                continue
            gain = gain_of(step, self._read(step.tensor).double().cpu())
            usable = gain.abs() > _TINY * gain.square().mean().sqrt()
            inverse = torch.where(usable, 1 / torch.where(usable, gain, 1.0), 0.0)
            if any(later.tensor is None for later in left[number + 1 :]):
                # The next LayerNorm takes a mean off as well: of all that this one makes the same, the one without.
                found = found - (found * inverse).sum() / inverse.sum()
            found = found * inverse
            found = found / found.norm()
        return found
