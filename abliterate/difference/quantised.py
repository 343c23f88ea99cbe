"""Whether values look as if they had been quantised in groups and stored in full again.

Two things tell. Errors of rounding to the nearest level are at most half a step of their group and fill the step
evenly; the changes of training do neither. And a group that was quantised to few bits has few different values,
whatever way levels were chosen; that tells only where the base's groups have more.
"""

from dataclasses import dataclass

from torch import Tensor

GROUP = 32
"""The smallest group in use (GGUF); larger ones are whole multiples of it."""
SIZES = (32, 64, 128, 0)
"""Of groups that are tried; 0 is a whole row."""
GROUPS, ENOUGH = 256, 4096
"""Looked at in every block, and in all."""
BITS = (3, 4, 5, 6, 8)
FEW = {2: 4, 3: 8, 4: 16}
"""Bits, and how many levels they make."""
MANY = 24
"""So many different values a group of the base has on average, to tell few levels from weights that repeat."""
HALF = 0.55
"""No error is larger, in steps, but for what storing in bf16 adds."""
STORING = 2.0**-8
"""The most that storing in bf16 moves a value, as a share of it, on both sides together."""
EVEN = (0.2, 0.4)
"""Root mean square of errors that fill a step evenly, in steps: 0.289, with room for that of storing."""


@dataclass(frozen=True)
class Quantiser:
    """A way to quantise: bits, size of groups, and whether levels are spread from the least to the largest value."""

    bits: int
    size: int
    spread: bool

    def step(self, groups: Tensor) -> Tensor:
        """Between levels of each group [n, 1]."""
        low, high = (groups.amin(1, keepdim=True), groups.amax(1, keepdim=True))
        levels = 2**self.bits - 1 if self.spread else 2 ** (self.bits - 1) - 1
        step: Tensor = (high - low if self.spread else high.maximum(-low)) / levels
        return step


QUANTISERS = tuple(Quantiser(bits, size, spread) for bits in BITS for size in SIZES for spread in (False, True))


class Levels:
    """Follows blocks and says how many bits the edited side looks quantised to."""

    def __init__(self) -> None:
        self._most, self._base, self._groups = 0, 0.0, 0
        self._errors = dict.fromkeys(QUANTISERS, (0.0, 0))

    def follow(self, base: Tensor, edited: Tensor, difference: Tensor) -> None:
        """Takes in a block [rows, columns]."""
        if base.shape[1] % GROUP or base.shape[1] < 2 * GROUP or self._groups >= ENOUGH:
            return
        distinct = [_distinct(_sampled(block, GROUP)) for block in (base, edited)]
        self._base += float(distinct[0].sum())
        self._most = max(self._most, int(distinct[1].max()))
        self._groups += len(distinct[0])
        left = {}
        for way, (square, count) in self._errors.items():
            found = _errors(way, base, difference)
            if found is not None:
                left[way] = square + found[0], count + found[1]
        self._errors = left

    @property
    def bits(self) -> int | None:
        """None where it does not look so, or nothing was seen."""
        if not self._groups:
            return None
        for way, (square, count) in self._errors.items():
            if count and EVEN[0] <= (square / count) ** 0.5 <= EVEN[1]:
                return way.bits
        if self._base / self._groups < MANY:
            return None
        return next((bits for bits, levels in FEW.items() if self._most <= levels), None)


def _errors(way: Quantiser, base: Tensor, difference: Tensor) -> tuple[float, int] | None:
    """The sum of the groups' mean squares in steps, and of how many groups; None where an error is too large."""
    size = way.size or base.shape[1]
    if base.shape[1] % size:
        return None
    groups, errors = _sampled(base, size), _sampled(difference, size)
    step = way.step(groups)
    there = step[:, 0] > 0
    groups, errors, step = groups[there], errors[there], step[there]
    if bool((errors.abs() > HALF * step + STORING * groups.abs().amax(1, keepdim=True)).any()):
        return None
    square, count = float((errors / step).square().mean(1).sum()), len(errors)
    return None if square < (EVEN[0] / 2) ** 2 * count else (square, count)


def _sampled(block: Tensor, size: int) -> Tensor:
    """Groups [n, size], evenly over the block."""
    groups = block.reshape(-1, size)
    return groups[:: max(1, len(groups) // GROUPS)].float()


def _distinct(groups: Tensor) -> Tensor:
    ordered = groups.sort(1).values
    return (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
