"""Whether weights hold NaN or infinity, at the speed of the cache, on one thread and without temporaries."""

import numpy as np
import torch
from torch import Tensor

from abliterate.checkpoint.read import bytes_of

_INFINITY = {
    torch.float64: (np.int64, np.uint64, 0x7FF0_0000_0000_0000, 0xFFF0_0000_0000_0000),
    torch.float32: (np.int32, np.uint32, 0x7F80_0000, 0xFF80_0000),
    torch.float16: (np.int16, np.uint16, 0x7C00, 0xFC00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80, 0xFF80),
}
"""Signed and unsigned integers of a dtype's width, and the bits of its infinities; the bits of NaN lie above them."""


def is_finite(block: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    Read as signed integers the largest element is the largest positive number, and everything not finite and positive
    lies above all that is finite; read as unsigned integers the same holds for negative numbers.

    Args:
        block: CPU tensor of a floating-point dtype, any shape.
    """
    if block.dtype not in _INFINITY:
        return bool(torch.isfinite(block.float()).all())
    signed, unsigned, positive, negative = _INFINITY[block.dtype]
    raw = bytes_of(block.contiguous())
    if not raw:
        return True
    return bool(np.frombuffer(raw, signed).max() < positive and np.frombuffer(raw, unsigned).max() < negative)
