"""Whether a low-rank difference is a projection: D = -s U (V^T W), with V^T U = 1 and W the base itself.

A projection takes out of W what W has along V, so that its right side is V^T W. Of a difference that was learned, as in
a LoRA, the right side has nothing to do with the base. V is not always U. Three forms are tried:

- plain: V = U, as in Arditi et al. 2024;
- gain: a norm with gain g stands behind the writer, and the stream sees g * U: V is g^2 * U, made dual to U;
- rows: the rows of W were made of length 1 before and got their lengths n back after: V is U / n^2, made dual to U.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abliterate.difference.matrix import PairMatrix

Form = Literal["plain", "gain", "rows"]
PROJECTS = 0.9
"""From this cosine on a difference counts as a projection. What was not made from W has about 1 / sqrt(columns)."""
BETTER = 1e-3
"""By so much another form than the plain one has to fit better."""


@dataclass(frozen=True)
class Fit:
    """How well a difference is a projection of its base.

    Attributes:
        form: which V fits best. `directions`: how many of the leading ones it is about.
        cosine: between U^T D and -V^T W; 1 for a projection, -1 for one that adds.
        strength: s; 1 takes all of it out.
        norm_change: relative change of the norms along the stream's axis that such a projection alone would have made,
            root mean square.
        before, after: share of the base's and of the edited matrix along V, ||V^T W||_F / ||W||_F with V orthonormal.
    """

    form: Form
    directions: int
    cosine: float
    strength: float
    norm_change: float
    before: float
    after: float

    @property
    def projects(self) -> bool:
        """Whether it is one."""
        return abs(self.cosine) >= PROJECTS


def fit(matrix: PairMatrix, out: Tensor, image: Tensor, weights: Mapping[Form, Tensor], norms: Tensor) -> Fit:
    """Tries all forms in one pass over the base.

    Args:
        out: U, orthonormal [stream, r]. `image`: U^T D [r, other].
        weights: for each form but the plain one what the stream sees U through [stream] fp64, entry by entry.
        norms: squared norms along the stream's axis of the base and of the edited matrix [2, other].
    """
    counts = sorted({1, out.shape[1]}, reverse=True)
    tried = [(form, v) for count in counts for form, v in _forms(out[:, :count].double(), weights)]
    along = _along(matrix, torch.cat([v for _, v in tried], 1).float()).double()
    fits, done = [], 0
    for form, v in tried:
        count = v.shape[1]
        fits.append(_one(form, v, along[done : done + count], image[:count].double(), norms))
        done += count
    return _best(fits)


def _best(fits: Sequence[Fit]) -> Fit:
    """Of all directions if they fit, else of the first alone; in another form than the plain one if that is better."""
    most = max(found.directions for found in fits)
    for count in (most, 1):
        alike = [found for found in fits if found.directions == count]
        best = max(alike, key=lambda found: abs(found.cosine))
        best = best if abs(best.cosine) > abs(alike[0].cosine) + BETTER else alike[0]
        if best.projects:
            return best
    return fits[0]


def _forms(basis: Tensor, weights: Mapping[Form, Tensor]) -> Iterator[tuple[Form, Tensor]]:
    """Forms, the plain one first, and their V [stream, r]."""
    yield "plain", basis
    for form, seen in weights.items():
        yield form, _dual(basis, seen.square())


def _dual(basis: Tensor, metric: Tensor) -> Tensor:
    """V in the span of metric * U with V^T U = 1."""
    weighted = basis * metric[:, None]
    dual: Tensor = weighted @ torch.linalg.pinv(basis.mT @ weighted)
    return dual


def _along(matrix: PairMatrix, covectors: Tensor) -> Tensor:
    """V^T W [r, other] of the base."""
    rows, columns = matrix.shape
    if not matrix.stream_is_rows:
        out = torch.empty(covectors.shape[1], rows)
        for place, block in matrix.base_blocks():
            out[:, place] = covectors.mT @ block.mT
        return out
    found = torch.zeros(covectors.shape[1], columns, dtype=torch.float64)
    for place, block in matrix.base_blocks():
        found += covectors[place].mT @ block
    return found


def _one(form: Form, covectors: Tensor, along: Tensor, moved: Tensor, norms: Tensor) -> Fit:
    product, square = float((along * moved).sum()), float(along.square().sum())
    length = math.sqrt(square * float(moved.square().sum()))
    strength = -product / square if square else 0.0
    # shares are told of the span, whatever the length of its vectors
    turn = torch.linalg.pinv(torch.linalg.qr(covectors)[1]).mT
    parts, sizes = [turn @ part for part in (along, along + moved)], norms.sum(1).sqrt().tolist()
    before, after = (float(part.norm()) / size if size else 0.0 for part, size in zip(parts, sizes, strict=True))
    there = norms[0] > 0
    shares = parts[0].square().sum(0)[there] / norms[0][there]
    left = (1 - (2 * strength - strength**2) * shares).clamp_min(0).sqrt()
    return Fit(
        form=form,
        directions=covectors.shape[1],
        cosine=-product / length if length else 0.0,
        strength=strength,
        norm_change=float((left - 1).square().mean().sqrt()) if len(left) else 0.0,
        before=before,
        after=after,
    )
