"""What is said of one pair of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from abliterate.difference.projecting import Fit, Form

State = Literal["same", "cast", "low-rank", "full-rank", "rounding", "vector", "incomparable"]


@dataclass(frozen=True)
class TensorDifference:
    """What differs in one pair of tensors.

    Attributes:
        name: in the base. `other`: in the edited checkpoint.
        shape: of what was compared. `dtypes`: as stored, base and edited.
        role: what the tensor is to the stream: see `Place`. `axis`: the stream's; 0 where none is known.
        state: same (every value), cast (every value rounded to another dtype and nothing else), low-rank, full-rank,
            rounding (nothing that rounding does not explain), vector (of one dimension), incomparable (no real
            numbers, or not finite).
        relative: ||D||_F / ||W||_F. `cosine`: of W and W + D. `changed`: share of elements. `largest`: absolute.
        far: where `state` is rounding, the share of the changed elements that moved further than rounding can move a
            weight of their size, as small ones do where small steps were added to all; None of other states.
        rank: singular values above the edge; at least so many where `rank_is_least`.
        edge: the largest singular value that rounding of both sides can make.
        spectrum: the largest singular values.
        tail: what is left without the counted ones, as a multiple of the noise's energy; None without noise.
        columns, rows: change of the norms along and across the stream's axis, relative, root mean square.
        fit: whether it is a projection of the base; None of what is not measured.
        cast: the dtype that it was rounded to, where `state` is cast. `bits`: that it looks quantised to.
        out: the leading directions on the stream's side, times their singular values [stream, r]; `weights`: what
            the stream sees them through, by form. Not part of the record.
    """

    name: str
    other: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    role: str
    layer: int | None
    axis: int
    state: State
    resized: bool = False
    relative: float = 0.0
    cosine: float = 1.0
    changed: float = 0.0
    changed_rows: int = 0
    largest: float = 0.0
    far: float | None = None
    rank: int = 0
    rank_is_least: bool = False
    edge: float = 0.0
    spectrum: tuple[float, ...] = ()
    tail: float | None = None
    columns: float | None = None
    rows: float | None = None
    fit: Fit | None = None
    cast: str | None = None
    bits: int | None = None
    out: Tensor | None = field(default=None, repr=False, compare=False)
    weights: Mapping[Form, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def writes(self) -> bool:
        """Whether what it makes goes into the stream."""
        return self.role in ("embedding", "writer")

    @property
    def differs(self) -> bool:
        """Whether any value is another, beyond a change of dtype."""
        return self.state not in ("same", "cast")
