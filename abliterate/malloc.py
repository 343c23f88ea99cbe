"""The C library's memory: what is freed goes back to the system, instead of lying about between what is in use."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""


@contextmanager
def frugal(least: int = 1 << 20) -> Iterator[None]:
    """Has the C library take pieces of `least` bytes and more from the system, and return each as soon as it is freed.

    Afterwards it keeps them for the next time, up to the size that it comes to keep by itself.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, least)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)


def give_back() -> None:
    """Has it return what else it holds of freed memory: that of one layer would lie beside the next one's."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if library.malloc_trim and library.mallopt else None
    except (OSError, AttributeError, TypeError):  # another C library
        return None
