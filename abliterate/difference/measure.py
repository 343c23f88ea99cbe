"""One pair of tensors measured: is it the same, by how much does it differ, and of which rank is that."""

from dataclasses import replace

from torch import Tensor

from abliterate.difference.matrix import PairMatrix, is_comparable
from abliterate.difference.noise import far_moves
from abliterate.difference.places import Place
from abliterate.difference.projecting import Form, fit
from abliterate.difference.resembling import own_rank
from abliterate.difference.sketch import Sketch, sketch
from abliterate.difference.survey import Survey, survey
from abliterate.difference.tensors import State, TensorDifference

FEW, MANY = 24, 144
"""Singular values that are looked for at first, and where those are not enough."""
SPARE = 8
"""Of these the last are not counted: they are the least exact."""
FAINT = 1e-3
"""Below this share of the largest, a singular value may be the arithmetic of whoever made the edit."""
LEADING = 0.1
"""From this share of the largest on, a singular value is of the leading part."""
TAIL_NOISE, TAIL_SHARE = 2.0, 1e-5
"""Nothing but rounding is left where it has no more than so many times the noise, or this share of the difference."""
SHOWN = 16


def measure(matrix: PairMatrix, place: Place, patient: bool = True) -> TensorDifference:
    """Measures one pair.

    Args:
        patient: look for many singular values where few are not enough.
    """
    pair = matrix.pair
    known = TensorDifference(
        name=pair.name,
        other=pair.other,
        shape=pair.shape,
        dtypes=(pair.base.dtype, pair.edited.dtype),
        role="head" if pair.head else place.role,
        layer=place.layer,
        axis=place.axis,
        state="incomparable",
        resized=pair.resized,
    )
    if matrix.same_bytes():
        return replace(known, state="same")
    if not (is_comparable(pair.base) and is_comparable(pair.edited)):
        return known
    found = survey(matrix)
    if not found.finite:
        return known
    if found.changed == 0:
        return replace(known, state="same")
    known = replace(
        known,
        relative=found.relative,
        cosine=found.cosine,
        changed=found.changed / found.elements,
        changed_rows=found.changed_rows,
        largest=found.largest,
    )
    rounded = next(iter((*found.rounded_to, *found.rounds_from)), None)
    if rounded is not None:
        return replace(known, state="cast", cast=rounded)
    try:
        return _spectral(matrix, place, found, patient, known)
    finally:
        matrix.forget()


def _spectral(
    matrix: PairMatrix, place: Place, found: Survey, patient: bool, known: TensorDifference
) -> TensorDifference:
    seen, rank, least = _spectrum(matrix, found, patient)
    left = max(0.0, found.difference - float(seen.values[:rank].square().sum()))
    noise = found.noise.energy
    out, image = _stream_side(matrix, seen, max(1, rank))
    weights = _weights(matrix, place, found)
    along, across = (1, 0) if matrix.stream_is_rows else (0, 1)
    fitted = fit(matrix, out, image, weights, (found.row_norms, found.column_norms)[along])
    state = _state(matrix, rank, least, left, found)
    return replace(
        known,
        state=state,
        far=_far(matrix, found) if state == "rounding" else None,
        rank=rank,
        rank_is_least=least,
        edge=found.noise.edge,
        spectrum=tuple(float(value) for value in seen.values[:SHOWN]),
        tail=left / noise if noise else None,
        columns=found.norm_change(along),
        rows=found.norm_change(across),
        fit=fitted,
        bits=found.levels,
        out=(out.double() * image.double().norm(dim=1))[:, : fitted.directions if fitted.projects else None],
        weights=weights,
    )


def _spectrum(matrix: PairMatrix, found: Survey, patient: bool) -> tuple[Sketch, int, bool]:
    """Leading singular values, how many are above the edge, and whether there may be more."""
    for wanted in (FEW, MANY)[: 2 if patient else 1]:
        seen = sketch(matrix.differences, *matrix.shape, wanted)
        counted = len(seen.values) - (0 if seen.complete else SPARE)
        floor = max(found.noise.edge, FAINT * float(seen.values[0]))
        rank = int((seen.values[:counted] > floor).sum())
        if rank < counted or seen.complete:
            return seen, own_rank(matrix, seen, rank, found.grids[1]), False
    return seen, rank, True


def _state(matrix: PairMatrix, rank: int, least: bool, left: float, found: Survey) -> State:
    if min(matrix.shape) == 1:
        return "vector"
    quiet = left <= max(TAIL_NOISE * found.noise.energy, TAIL_SHARE * found.difference)
    if rank == 0:
        return "rounding" if quiet else "full-rank"
    return "low-rank" if quiet and not least and rank <= min(matrix.shape) // 4 else "full-rank"


def _far(matrix: PairMatrix, found: Survey) -> float:
    moves = (far_moves(block.base.float(), block.edited.float(), found.grids) for block in matrix.blocks())
    return sum(moves) / found.changed


def _stream_side(matrix: PairMatrix, seen: Sketch, rank: int) -> tuple[Tensor, Tensor]:
    """Leading directions U [stream, r], and U^T D [r, other]."""
    values = seen.values[:rank]
    count = max(1, min(SHOWN, int((values >= LEADING * values[0]).sum())))
    left, right, scale = seen.left[:, :count], seen.right[:, :count], seen.values[:count].float()
    out, other = (left, right) if matrix.stream_is_rows else (right, left)
    return out, (other * scale).mT


def _weights(matrix: PairMatrix, place: Place, found: Survey) -> dict[Form, Tensor]:
    """What the stream sees the matrix's outputs through, entry by entry; see `projecting`."""
    weights: dict[Form, Tensor] = {}
    if place.gain is not None:
        weights["gain"] = place.gain
    rows = (found.row_norms if matrix.stream_is_rows else found.column_norms)[0]
    if bool((rows > 0).all()) and min(matrix.shape) > 1:
        weights["rows"] = rows.rsqrt()
    return weights
