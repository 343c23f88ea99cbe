"""Whether values look as if they had been quantised in groups and stored in full again.

Weights that were quantised to few bits have few different values in every group of neighbours along a row, where those
of the base have many. With 8 bits a group has more levels than members; there the errors tell: none is more than half a
step of its group's range, and they fill that range evenly, which the changes of training do not.
"""

from torch import Tensor

GROUP = 32
"""The smallest group in use (GGUF); larger ones are whole multiples of it."""
ROOM = (32, 64, 128, 0)
"""Sizes of groups of 8 bits that are tried; 0 is a whole row."""
GROUPS = 256
"""Looked at in every block."""
FEW = {2: 4, 3: 8, 4: 16}
"""Bits, and how many levels they make."""
MANY = 24
"""So many different values a group of the base has on average, to tell few levels from weights that repeat."""
HALF = 0.8
"""No error is larger, in steps: half a step, and what storing the largest weights of a group in bf16 adds."""
EVEN = (0.2, 0.4)
"""Root mean square of errors that fill a step evenly, in steps: 0.289, with room for that of storing."""


class Levels:
    """Follows blocks and says how many bits the edited side looks quantised to."""

    def __init__(self) -> None:
        self._most, self._base, self._groups = 0, 0.0, 0
        self._errors = {size: [0.0, 0.0, 0.0] for size in ROOM}

    def follow(self, base: Tensor, edited: Tensor, difference: Tensor) -> None:
        """Takes in a block [rows, columns]."""
        if base.shape[1] % GROUP or base.shape[1] < 2 * GROUP:
            return
        distinct = [_distinct(_sampled(block, GROUP)) for block in (base, edited)]
        self._base += float(distinct[0].sum())
        self._most = max(self._most, int(distinct[1].max()))
        self._groups += len(distinct[0])
        self._errors = {size: _errors(size, found, base, difference) for size, found in self._errors.items()}
        self._errors = {size: found for size, found in self._errors.items() if found[0] <= HALF}

    @property
    def bits(self) -> int | None:
        """None where it does not look so, or nothing was seen."""
        if not self._groups or self._base / self._groups < MANY:
            return None
        few = next((bits for bits, levels in FEW.items() if self._most <= levels), None)
        even = (EVEN[0] <= (square / count) ** 0.5 <= EVEN[1] for _, square, count in self._errors.values() if count)
        return few or (8 if any(even) else None)


def _errors(size: int, found: list[float], base: Tensor, difference: Tensor) -> list[float]:
    """The largest error so far, the sum of mean squares, and of how many groups, all in steps of 8 bits."""
    size = size or base.shape[1]
    if base.shape[1] % size:
        return [HALF + 1, 0.0, 0.0]
    step = _sampled(base, size).abs().amax(1, keepdim=True) / 127
    there = step[:, 0] > 0
    errors = _sampled(difference, size)[there] / step[there]
    if not errors.numel():
        return found
    largest, square, count = found
    return [
        max(largest, float(errors.abs().max())),
        square + float(errors.square().mean(1).sum()),
        count + len(errors),
    ]


def _sampled(block: Tensor, size: int) -> Tensor:
    """Groups [n, size], evenly over the block."""
    groups = block.reshape(-1, size)
    return groups[:: max(1, len(groups) // GROUPS)].float()


def _distinct(groups: Tensor) -> Tensor:
    ordered = groups.sort(1).values
    return (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
