"""The projector of one writer: W <- W - u (v.W), with v.u = 1."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abliterate.errors import EditError

Form = Literal["plain", "oblique", "orthogonal", "span"]
# An entry of the gain below this share of its root mean square makes r / g large there: the oblique form would then put
# a large change into few rows, and the orthogonal form is the better one.
SMALL_GAIN = 1e-2


@dataclass(frozen=True)
class Projector:
    """Removes from a writer's output what reaches the stream along r.

    Attributes:
        u: [hidden] fp64, what is subtracted. `v`: [hidden] fp64, the covector that is measured; v.u = 1.
        form: plain (u = v = r), oblique (u = r/g, v = g*r), orthogonal (u = v = normalize(g*r)), or span (u = v = an
            orthonormal basis [k, hidden] of several covectors, all of which go).
    """

    u: Tensor
    v: Tensor
    form: Form


def make_projector(direction: Tensor, gain: Tensor | None = None) -> Projector:
    """The projector for a writer, with the gain of the norm behind it (DESIGN 3.3).

    Args:
        direction: r [hidden], not zero.
        gain: g [hidden]; None where the output goes into the stream as it is.

    Raises:
        EditError: the direction or the gain is zero or not finite.
    """
    norm = float(direction.double().norm())
    if not 0 < norm < math.inf:
        raise EditError("the direction is zero or not finite")
    r = direction.double() / norm
    if gain is None:
        return Projector(r, r, "plain")
    g = gain.double()
    if not bool(torch.isfinite(g).all()) or not bool((g * r).any()):
        raise EditError("a norm's gain is zero along the direction, or not finite")
    v = g * r
    matters = r != 0
    if bool((g[matters].abs() < SMALL_GAIN * g.square().mean().sqrt()).any()):
        v = v / v.norm()
        return Projector(v, v, "orthogonal")
    u = torch.where(matters, r / torch.where(matters, g, 1.0), 0.0)
    return Projector(u, v, "oblique")


def span_projector(covectors: Tensor) -> Projector:
    """The projector for a writer that the stream sees through several covectors.

    Args:
        covectors: [k, hidden].

    Raises:
        EditError: one of them is zero or not finite.
    """
    norms = covectors.double().norm(dim=-1, keepdim=True)
    if not bool(torch.isfinite(norms).all()) or not bool((norms > 0).all()):
        raise EditError("a covector is zero or not finite")
    if len(covectors) == 1:
        v = (covectors.double() / norms)[0]
        return Projector(v, v, "orthogonal")
    left, sizes, _ = torch.linalg.svd((covectors.double() / norms).T, full_matrices=False)
    basis = left[:, sizes > sizes[0] * 1e-10].T.contiguous()
    return Projector(basis, basis, "span")
