"""From a tensor's gradients to its covectors, and from those to the steps that lie between it and the stream."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.architecture.covector import pull_back
from abliterate.architecture.writer import Path, Step
from abliterate.errors import EditError

_MOST_SCALES = 3
_MOST_CANDIDATES = 4000
_CENTER = Step("center")


@dataclass(frozen=True)
class Span:
    """What the gradients of one tensor span.

    Attributes:
        axis: of length width, along which they have the lowest rank; None where no axis has that length.
        basis: orthonormal, fp64 [width, rank], or [elements, rank] where there is no such axis.
    """

    axis: int | None
    basis: Tensor

    @property
    def rank(self) -> int:
        """How many covectors it takes."""
        return self.basis.shape[1]


def find_span(gradients: Sequence[Tensor], width: int, tolerance: float) -> Span:
    """The span of gradients [draws, *shape]; singular values below tolerance, of the largest, count as zero."""
    axes = [axis for axis, size in enumerate(gradients[0].shape[1:]) if size == width]
    if not axes:
        return Span(None, _column_space([g.flatten(1).T for g in gradients], tolerance))
    unfolded = {axis: [g.movedim(axis + 1, 0).flatten(1) for g in gradients] for axis in axes}
    spans = [Span(axis, _column_space(blocks, tolerance)) for axis, blocks in unfolded.items()]
    return min(spans, key=lambda span: span.rank)


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Orthonormal basis of what two orthonormal bases [width, k] span together."""
    return _column_space([first, second], 1e-4)


def _column_space(blocks: Sequence[Tensor], tolerance: float) -> Tensor:
    columns = torch.cat(list(blocks), 1)
    if columns.shape[1] > columns.shape[0]:
        # The same left singular vectors, from a square.
        columns = torch.linalg.qr(columns.T, mode="r")[1].T
    left: Tensor
    left, values, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, values > tolerance * values[0]]


def explain(
    basis: Tensor, directions: Iterable[tuple[int, Tensor]], scales: Mapping[str, Tensor], tolerance: float
) -> tuple[int, Path] | None:
    """The simplest way for one of the directions to become this span.

    Args:
        basis: orthonormal, fp64 [width, k].
        directions: r_l [width] at the points l of the stream that the tensor may write to, with their numbers.
        scales: gains [width] and kernels [width, 1, taps] that may lie between, by run-time name.
        tolerance: largest sine of the angle between the spans.

    Returns:
        The number of the point and the steps from there, or None where nothing fits.
    """
    width, rank = basis.shape
    gains = [name for name, w in scales.items() if w.numel() == width]
    kernels = [name for name, w in scales.items() if w.dim() == 3 and w.numel() > width]
    ends: list[Path] = [(Step("taps", name),) for name in kernels] if rank > 1 else [()]
    places = list(directions)
    for path in itertools.islice(_scalings(gains), _MOST_CANDIDATES):
        for (place, r), end in itertools.product(places, ends):
            u = _passed(path + end, r, scales)
            if u is not None and float((basis - u @ (u.T @ basis)).norm()) < tolerance * rank:
                return place, path + end
    return None


def _passed(path: Path, r: Tensor, scales: Mapping[str, Tensor]) -> Tensor | None:
    """Orthonormal basis [width, k] of what r becomes; None where a gain of zeros leaves nothing."""
    try:
        covectors = pull_back(r.double()[None], path, lambda name: scales[name].detach())
    except EditError:
        return None
    basis: Tensor = torch.linalg.qr(covectors.T)[0]
    return basis


def _scalings(gains: Sequence[str]) -> Iterator[Path]:
    """Products of gains, from the simplest on; a gain and then a center is a LayerNorm."""
    yield ()
    yield (_CENTER,)
    for count in range(1, _MOST_SCALES + 1):
        for names, offsets in itertools.product(
            itertools.combinations(gains, count), itertools.product((0.0, 1.0), repeat=count)
        ):
            scales = tuple(Step("scale", name, offset) for name, offset in zip(names, offsets, strict=True))
            yield scales
            yield (*scales, _CENTER)
        if count == 2:
            yield from _two_norms(gains)


def _two_norms(gains: Sequence[str]) -> Iterator[Path]:
    for first, second in itertools.permutations(gains, 2):
        norms = (Step("scale", first), _CENTER, Step("scale", second))
        yield (*norms, _CENTER)
        yield norms
