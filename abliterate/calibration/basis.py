"""Orthonormal bases of a few directions: the subspace that is taken out of the stream."""

import torch
from torch import Tensor

_DEPENDENT = 1e-6
"""Of a vector's length: where no more is left of it, it lies in the span of those before it."""


def orthonormal(vectors: Tensor) -> Tensor:
    """Gram-Schmidt, twice over against rounding: each row less what those before it span, and of length 1.

    The span of the first j rows is that of the first j vectors, for every j.

    Args:
        vectors: [..., k, hidden].

    Returns:
        [..., k, hidden] in the dtype of `vectors`, computed in fp64; rows of zeros where a vector is zero or lies in
        the span of those before it.
    """
    given = vectors.double()
    basis = torch.zeros_like(given)
    for j in range(given.shape[-2]):
        row = given[..., j, :]
        size = row.norm(dim=-1, keepdim=True)
        left = row / size.clamp_min(torch.finfo(torch.float64).tiny)
        for _ in range(2):
            left = left - torch.einsum("...k,...kh->...h", torch.einsum("...kh,...h->...k", basis, left), basis)
        length = left.norm(dim=-1, keepdim=True)
        usable = length > _DEPENDENT
        basis[..., j, :] = torch.where(usable, left / torch.where(usable, length, 1.0), 0.0)
    return basis.to(vectors.dtype)
