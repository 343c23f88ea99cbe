"""Whether differences share an output direction, and what part of the stream they span together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.difference.projecting import Form
from abliterate.difference.tensors import TensorDifference

SPANNED = 0.99
"""Of the differences' energy, each tensor counted alike, the span holds so much."""
ALIKE = 0.98
"""From this share on, one direction is what all write along."""
BETTER = 0.005
"""By so much more of them one direction has to hold, for another form than the plain one."""


@dataclass(frozen=True)
class Shared:
    """What the differences of residual writers have in common on the stream's side.

    Attributes:
        tensors: how many were looked at.
        form: how their directions were compared: as they are (plain), behind the norm that follows (gain), or with the
            rows of each writer made of length 1 (rows).
        widest: how many leading directions a single tensor has at most.
        dimensions: how many directions hold 99 % of them, every tensor counted alike. `shares`: of the first ones.
        is_least: there may be more, since of a difference of full rank only the leading directions are looked at.
        direction: the first [hidden] fp32, of length 1.
        cosines: least and median abs(cosine) of a tensor's own leading direction with it.
    """

    tensors: int
    form: Form
    widest: int
    dimensions: int
    is_least: bool
    shares: tuple[float, ...]
    cosines: tuple[float, float]
    direction: Tensor = field(repr=False, compare=False)
    basis: Tensor = field(repr=False, compare=False)

    @property
    def one(self) -> bool:
        """Whether all write along one direction."""
        return self.shares[0] >= ALIKE

    @property
    def few(self) -> bool:
        """Whether all write along the same few directions: no more than a single one does."""
        return self.dimensions <= self.widest


def share(tensors: Sequence[TensorDifference]) -> Shared | None:
    """What the differences of some writers share; None where there is none to look at."""
    seen = [tensor for tensor in tensors if tensor.out is not None]
    if not seen:
        return None
    width = len(_out(seen[0]))
    seen = [tensor for tensor in seen if len(_out(tensor)) == width]
    plain = _share(seen, "plain")
    forms: tuple[Form, ...] = ("gain", "rows")
    others = [_share(seen, form) for form in forms if any(form in tensor.weights for tensor in seen)]
    best = max([plain, *others], key=lambda found: found.shares[0])
    return best if best.shares[0] > plain.shares[0] + BETTER else plain


def _out(tensor: TensorDifference) -> Tensor:
    assert tensor.out is not None
    return tensor.out


def as_seen(tensor: TensorDifference, form: Form) -> Tensor:
    """A tensor's leading directions in the stream [stream, r], the first of length 1."""
    out = _out(tensor).double()
    if form in tensor.weights:
        out = out * tensor.weights[form][:, None]
    return out / (float(out[:, 0].norm()) or 1.0)


def _share(tensors: Sequence[TensorDifference], form: Form) -> Shared:
    columns = [_unit(as_seen(tensor, form)) for tensor in tensors]
    left, sizes, _ = torch.linalg.svd(torch.cat(columns, 1), full_matrices=False)
    shares = sizes.square() / sizes.square().sum()
    direction, total = left[:, 0], torch.cumsum(shares, 0)
    first = [column[:, 0] / column[:, 0].norm() for column in columns]
    cosines = sorted(abs(float(direction @ vector)) for vector in first)
    dimensions = int((total < SPANNED).sum()) + 1
    return Shared(
        tensors=len(tensors),
        form=form,
        widest=max(column.shape[1] for column in columns),
        dimensions=min(dimensions, len(shares)),
        is_least=any(tensor.state == "full-rank" for tensor in tensors),
        shares=tuple(shares[:8].tolist()),
        cosines=(cosines[0], cosines[len(cosines) // 2]),
        direction=_signed(direction).float(),
        basis=left[:, : min(dimensions, len(shares))].mT.float(),
    )


def _unit(columns: Tensor) -> Tensor:
    return columns / (math.sqrt(float(columns.square().sum())) or 1.0)


def _signed(direction: Tensor) -> Tensor:
    """With its largest entry positive: the sign of a singular vector means nothing."""
    return direction * torch.sign(direction[direction.abs().argmax()])
