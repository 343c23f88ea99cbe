"""Messages: one printable line of bounded length, whatever names are in them."""

import pytest

from abliterate.errors import MOST_CHARACTERS, AbliterateError, RefusedError, one_line


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", "a b"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\ud800", r"\ud800"),
        ("\u202etxt", r"\u202etxt"),
        ("\u2028", " "),
        ("é 𝕏", "é 𝕏"),
    ],
)
def test_control_characters_are_escaped(name: str, shown: str) -> None:
    assert str(AbliterateError(f"no {name} here")) == f"no {shown} here"
    assert str(RefusedError(name, "why")) == shown


@pytest.mark.parametrize("filling", ["x", "\n", "\U000e0001"])
def test_the_ends_of_what_is_long_stay(filling: str) -> None:
    line = str(AbliterateError(f"folder/shard: {filling * 1_000_000}; download it again"))
    assert len(line) <= MOST_CHARACTERS and line.isprintable()
    assert line.startswith("folder/shard: ") and line.endswith("; download it again")
    assert one_line("y" * MOST_CHARACTERS) == "y" * MOST_CHARACTERS
