"""How many directions carry refusal: the span of the first k is ablated, for every k."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.audit.effects import Effect
from abliterate.calibration.basis import orthonormal
from abliterate.direction.means import Directions
from abliterate.direction.scoring import Key

NEW = 0.3
"""The least part of a direction that has to lie outside the span so far; its cosine with the span is then <= 0.954."""


@dataclass(frozen=True)
class Span:
    """Refusals with more and more directions removed.

    Attributes:
        keys: (position, layer) of each direction, in the order in which they join.
        effects: of removing the first 1, 2, ... of them.
    """

    keys: tuple[Key, ...]
    effects: tuple[Effect, ...]

    @property
    def enough(self) -> int:
        """The least k after which refusals fall by no more than one prompt, whatever is added."""
        rates = [effect.refusals for effect in self.effects]
        fewest = min(rate.share for rate in rates)
        return 1 + next(k for k, rate in enumerate(rates) if (rate.share - fewest) * rate.count < 1.5)


def leading(
    directions: Directions, pick: Key, bypass: Sequence[tuple[Key, float]], most: int
) -> tuple[list[Key], Tensor]:
    """The pick, then greedily what removes most refusal by itself and is not in the span of those before it.

    Args:
        bypass: candidates with their scores, in any order.
        most: how many directions at most.

    Returns:
        Where they come from, and an orthonormal basis [k, hidden] fp32 whose first j rows span the first j.
    """
    order = [pick, *(key for key, score in sorted(bypass, key=lambda item: item[1]) if not math.isnan(score))]
    keys: list[Key] = []
    basis = torch.zeros(0, directions.grid.shape[-1], dtype=torch.float64)
    for key in order:
        if len(keys) == most:
            break
        unit = directions.unit(*key).double()
        if float((unit - (basis @ unit) @ basis).norm()) >= NEW:
            keys.append(key)
            basis = orthonormal(torch.cat([basis, unit[None]]))
    return keys, basis.float()
