"""Sizes as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.errors import AbliterateError
from abliterate.sizes import enough, parse_size, short
from tests.commandline import run_here


@given(st.integers(1, 10**16))
def test_what_is_asked_for_is_enough_and_hardly_more(size: int) -> None:
    assert size <= parse_size(enough(size)) <= size * 1.01 + 1


def test_units() -> None:
    assert [parse_size(text) for text in ("1GB", "1.5 gb", "2GiB", "300M", "7")] == [
        10**9,
        15 * 10**8,
        2**31,
        3 * 10**8,
        7,
    ]
    assert [short(size) for size in (7, 14221536, 141 * 10**9, 38 * 10**11)] == [
        "7.0 B",
        "14.2 MB",
        "141.0 GB",
        "3.8 TB",
    ]
    for text in ("", "0", "auto", "-1GB", "GB"):
        with pytest.raises(AbliterateError, match="is not a size such as 100GB"):
            parse_size(text)


def test_a_limit_that_is_no_size_is_wrong_usage() -> None:
    ran = run_here("convert", "org/name", "out", "--cache-limit", "much")
    assert ran.code == 2 and "'much' is not a size such as 100GB" in ran.err
