"""A pair of tensors as two matrices of the same shape, in blocks of rows: a few megabytes at a time."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import DTYPES, Header, TensorInfo
from abliterate.checkpoint.read import open_shard, read_rows, read_tensor, rows_in
from abliterate.difference.pairs import Pair

BLOCK_BYTES = 2 << 20
"""Of one side as stored: what is made of it in fp32 then stays in the cache."""
KEEP_BYTES = 256 << 20
"""A difference that is no larger in fp32 is kept between passes; of a larger one the files are read again."""


@dataclass(frozen=True)
class Block:
    """Rows of both matrices [rows, columns], in fp32, or fp64 where one is stored so."""

    rows: slice
    base: Tensor
    edited: Tensor

    @property
    def difference(self) -> Tensor:
        """Edited less base, fp32."""
        return (self.edited - self.base).float()


@dataclass
class PairMatrix:
    """A pair as matrices in which the stream's axis, where one is known, is one side and all others the other.

    Attributes:
        pair: the tensors. `homes`: the shards that hold them.
        axis: the stream's; 0 where none is known.
    """

    pair: Pair
    homes: tuple[Header, Header]
    axis: int
    _kept: list[tuple[slice, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, pair: Pair, base: Checkpoint, edited: Checkpoint, axis: int) -> "PairMatrix":
        """The pair in its checkpoints."""
        return cls(pair, (base.shard_of(pair.name), edited.shard_of(pair.other)), axis)

    @property
    def stream_is_rows(self) -> bool:
        """Whether the stream's axis became the rows'; else it is the columns'."""
        return self.axis == 0 and len(self.pair.shape) > 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        shape = self.pair.shape
        if len(shape) < 2:
            return 1, math.prod(shape)
        columns = math.prod(shape[1:]) if not self.axis else shape[self.axis]
        return math.prod(shape) // columns if columns else 0, columns

    def blocks(self) -> Iterator[Block]:
        """All rows of both, in order."""
        done = 0
        for base, edited in self._stored():
            pair = [self._matrix(_real(block, self._double)) for block in (base, edited)]
            yield Block(slice(done, done + len(pair[0])), pair[0], pair[1])
            done += len(pair[0])

    def base_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows of the base, fp32."""
        done = 0
        for (base,) in self._stored(1):
            block = self._matrix(base.float())
            yield slice(done, done + len(block)), block
            done += len(block)

    def differences(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows of the difference, fp32; kept for the next call where they are small enough, see `forget`."""
        if self._kept:
            yield from self._kept
            return
        kept, small = [], 4 * math.prod(self.shape) <= KEEP_BYTES
        for block in self.blocks():
            found = block.rows, block.difference
            if small:
                kept.append(found)
            yield found
        self._kept = kept

    def forget(self) -> None:
        """Lets go of what is kept."""
        self._kept = []

    def same_bytes(self) -> bool:
        """Whether both are stored alike, to the last bit; ends at the first block that differs."""
        if self.pair.base.dtype != self.pair.edited.dtype:
            return False
        return all(torch.equal(_bytes(a), _bytes(b)) for a, b in self._stored())

    @property
    def _double(self) -> bool:
        return "F64" in (self.pair.base.dtype, self.pair.edited.dtype)

    def _matrix(self, block: Tensor) -> Tensor:
        if block.dim() < 2:
            return block.reshape(1, -1)
        if not self.axis:
            return block.reshape(len(block), -1)
        return block.movedim(self.axis, -1).reshape(-1, block.shape[self.axis])

    def _stored(self, sides: int = 2) -> Iterator[tuple[Tensor, ...]]:
        """The same rows of each side, as stored."""
        infos = (self.pair.base, self.pair.edited)[:sides]
        if math.prod(self.pair.shape) == 0:
            return
        if len(self.pair.shape) < 2:
            yield tuple(read_tensor(home, info) for home, info in zip(self.homes, infos, strict=False))
            return
        row_bytes = max(info.nbytes // info.shape[0] for info in (self.pair.base, self.pair.edited))
        step = rows_in(BLOCK_BYTES, row_bytes)
        with ExitStack() as stack:
            files = [stack.enter_context(open_shard(home)) for home in self.homes[:sides]]
            for first in range(0, self.pair.rows, step):
                rows = slice(first, min(self.pair.rows, first + step))
                yield tuple(
                    read_rows(fd, home, info, rows) for fd, home, info in zip(files, self.homes, infos, strict=False)
                )


def _real(block: Tensor, double: bool) -> Tensor:
    return block.double() if double else block.float()


def _bytes(block: Tensor) -> Tensor:
    return block.contiguous().reshape(-1).view(torch.uint8)


def is_comparable(info: TensorInfo) -> bool:
    """Whether a tensor holds real numbers, which can be subtracted."""
    return DTYPES[info.dtype].is_floating_point
