"""Ablation by degrees: every writer of a layer gives up its own share of its own direction, at run time.

Of an output o goes on o - s r (r . o), which is what the weight edit W - s r (r^T W) makes of it: strengths s and
directions r can be tried, and improved along their gradients, before any weight is touched.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from abliterate.calibration.hooks import Stream, on_output

KINDS = ("attention", "mlp")
"""What the columns of strengths stand for; mixers stand in for attention."""
_COLUMNS = {"attention": 0, "mixer": 0, "mlp": 1}
Cell = tuple[int, int]
"""Of a table of strengths: layer and column."""


@dataclass(frozen=True)
class Dials:
    """How much of which direction writers give up.

    Attributes:
        strengths: [layers, 2] fp32, see `KINDS`; 0 leaves a writer alone, 1 takes all of its direction out.
        directions: [layers, hidden] fp32, unit vectors at the end of the stream.
    """

    strengths: Tensor
    directions: Tensor


def cells_of(stream: Stream) -> list[Cell | None]:
    """The strength that goes with each writer; None for those outside of layers, and of other kinds."""
    if len(stream.places) != len(stream.writers):
        raise ValueError("the stream does not say which layers its writers are in")
    return [None if layer is None or kind not in _COLUMNS else (layer, _COLUMNS[kind]) for layer, kind in stream.places]


class Dialled:
    """Dials, as each of the stream's writers is concerned.

    Attributes:
        cells: see `cells_of`.
        dials: what is set.
    """

    def __init__(self, stream: Stream, dials: Dials) -> None:
        self.cells, self.dials, self._stream = cells_of(stream), dials, stream
        along = stream.along(dials.directions)
        self._seen = [None if cell is None else along[i][cell[0]] for i, cell in enumerate(self.cells)]

    def direction(self, number: int, like: Tensor) -> Tensor | None:
        """What a writer gives up [hidden], as it sees it there; None where it gives up nothing."""
        seen = self._seen[number]
        return None if seen is None else seen.to(like.device, like.dtype)

    def change(self, number: int, output: Tensor) -> Tensor:
        """What goes on of an output [..., hidden] of a writer."""
        cell, r = self.cells[number], self.direction(number, output)
        strength = 0.0 if cell is None else float(self.dials.strengths[cell])
        return output if r is None or not strength else output - strength * (output @ r)[..., None] * r

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Applies them to all rows of the passes that are made meanwhile, by whoever enters this."""
        with ExitStack() as stack:
            for number, writer in enumerate(self._stream.writers):
                if self.cells[number] is not None:
                    stack.enter_context(on_output([writer], partial(self.change, number)))
            yield


class Slopes:
    """Gradients of scalars with respect to the dials, each call's alone, so that their order makes no difference.

    With o an output and g the gradient at what went on of it, that of a strength is -(g . r)(r . o), and that of a
    direction -s ((r . o) g + (g . r) o), summed over tokens.

    Attributes:
        dialled: at which they are taken.
        strengths: [calls, layers, 2] fp64.
        directions: [calls, layers, hidden] fp64; None unless wanted.
    """

    def __init__(self, dialled: Dialled, calls: int, directions: bool) -> None:
        dials = dialled.dials
        self.dialled = dialled
        self.strengths = torch.zeros(calls, *dials.strengths.shape, dtype=torch.float64)
        self.directions = torch.zeros(calls, *dials.directions.shape, dtype=torch.float64) if directions else None

    def add(self, call: int, number: int, output: Tensor, gradient: Tensor) -> None:
        """Takes one output of a writer; see `gradients_at`."""
        gradient, output = gradient.float().flatten(0, -2), output.float().flatten(0, -2)
        cell, r = self.dialled.cells[number], self.dialled.direction(number, gradient)
        if cell is None or r is None:
            return
        within, back = output @ r, gradient @ r
        self.strengths[call, cell[0], cell[1]] -= float((within * back).double().sum())
        if self.directions is not None:
            along = within @ gradient + back @ output
            self.directions[call, cell[0]] -= float(self.dialled.dials.strengths[cell]) * along.cpu().double()
