"""Gradients of a traced residual stream, with the direction pulled back over the skip paths.

The graph is cut at every layer's input, so that a tensor influences only what comes right after it, and the direction
is taken back on its own: r_l, what r has to be at the input of layer l to end up as r at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.architecture.trace import Stream, Trace


@dataclass(frozen=True)
class Gradients:
    """Gradients of `sum c <r_l, h_l>` at every point l, with c random.

    Attributes:
        covectors: r_l, fp64 [points, width] of unit length.
        by_tensor: by name and by point, fp64 [draws, *shape of the tensor].
        mixed: layers that take r_l to more than one covector on their skip path, so that no r_l exists: to how many.
    """

    covectors: Tensor
    by_tensor: Mapping[str, Mapping[int, Tensor]]
    mixed: Mapping[str, int]


def take_gradients(
    trace: Trace, stream: Stream, r: Tensor, tensors: Mapping[str, Tensor], draws: int, tolerance: float, seed: int
) -> Gradients:
    """Gradients by every tensor, for the unit vector r [width] at the last point; see `Gradients`.

    Args:
        draws: of c, per point.
        tolerance: singular values below this, relative to the largest, count as zero.
    """
    last = len(trace.points) - 1
    puller = _Puller(trace, list(tensors), list(tensors.values()), draws, torch.Generator().manual_seed(seed))
    covectors, mixed = {last: r.double()}, {}
    for point in range(last, -1, -1):
        if point < last:
            covectors[point], rank = _skipped(puller.rows.pop(point, []), covectors[point + 1], tolerance)
            if rank > 1:
                mixed[stream.layers[point] if point < len(stream.layers) else "final norm"] = rank
        puller.pull(point, covectors[point])
    return Gradients(torch.stack([covectors[point] for point in range(last + 1)]), puller.by_tensor, mixed)


@dataclass
class _Puller:
    """Takes the gradients of one point after the other, from the last to the first.

    Attributes:
        by_tensor: see `Gradients`.
        rows: by leaf, gradients [n, width] at its tokens, of the points pulled so far.
    """

    trace: Trace
    names: list[str]
    tensors: list[Tensor]
    draws: int
    generator: torch.Generator
    by_tensor: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    rows: dict[int, list[Tensor]] = field(default_factory=dict)

    def pull(self, point: int, covector: Tensor) -> None:
        value, leaves = self.trace.points[point], self.trace.leaves[:point]
        if not value.requires_grad:
            return
        drawn = [self._grad(value, covector, leaves) for _ in range(self.draws)]
        for i, name in enumerate(self.names):
            if drawn[0][i] is not None:
                self.by_tensor.setdefault(name, {})[point] = torch.stack([d[i] for d in drawn]).double()
        for leaf in range(len(leaves)):
            found = [d[len(self.names) + leaf] for d in drawn]
            if found[0] is not None:
                width = covector.shape[0]
                self.rows.setdefault(leaf, []).extend(g.double().reshape(-1, width) for g in found)

    def _grad(self, value: Tensor, covector: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        c = torch.randn(value.shape[:-1], generator=self.generator, dtype=value.dtype)
        total = (c * (value @ covector.to(value.dtype))).sum()
        return torch.autograd.grad(total, [*self.tensors, *leaves], retain_graph=True, allow_unused=True)


def _skipped(rows: Sequence[Tensor], after: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """What the covector `after` becomes on its way back over a skip path, and how many it becomes (0: no path).

    Where it becomes several, none of them is better than `after` itself.
    """
    if not rows:
        return after, 0
    stacked = torch.cat(list(rows))
    norms = stacked.norm(dim=-1, keepdim=True)
    kept = (norms > tolerance * norms.max()).squeeze(-1)
    if not kept.any():
        return after, 0
    _, values, right = torch.linalg.svd(stacked[kept] / norms[kept], full_matrices=False)
    found, rank = right[0] * torch.sign(right[0] @ after), int((values > tolerance * values[0]).sum())
    return after if rank > 1 or (found - after).norm() < tolerance else found, rank
