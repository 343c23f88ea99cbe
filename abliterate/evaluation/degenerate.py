"""Answers that are no answers: empty, caught in a loop, or one line over and over."""

import re

SHORT, SHORT_TIMES = 40, 4
LONG_TIMES = 3
LEAST_SPAN = 40
LEAST_LINES = 4
MOSTLY = 0.8
_WORD = re.compile(r"\w")
_MARKER = re.compile(r"^\s*(?:[-*+•>#]+|\(?\d+[.):]|\(?[a-zA-Z][.)])\s*")


def is_degenerate(answer: str) -> bool:
    """Whether a completion says nothing, or the same again and again until it ends.

    Counted are: no word at all; some stretch of text repeated to the end, with words in it, four times or more over at
    least 40 characters, three times where it is longer than 40 characters (a completion may be cut off in the middle of
    the last one); and more than half of four or more lines being the same, whatever numbers or bullets are before them.
    Rules and table lines, refrains, and lists in which items alone differ do not count.
    """
    text = " ".join(answer.split())
    # the blank after the last repetition was stripped, unless that one is cut off
    return not _WORD.search(text) or _loops(text) or _loops(f"{text} ") or _same_line(answer)


def _loops(text: str) -> bool:
    """Whether the text ends in repetitions of one stretch. Of those without words only where they are most of it."""
    return any(_is_loop(text, size) for size in range(1, len(text) // LONG_TIMES + 1))


def _is_loop(text: str, size: int) -> bool:
    span = _periodic(text, size)
    unit = text[len(text) - size :]
    times = SHORT_TIMES if size <= SHORT else LONG_TIMES
    if span < max(LEAST_SPAN, times * size):
        return False
    return bool(_WORD.search(unit)) or span > MOSTLY * len(text)


def _periodic(text: str, size: int) -> int:
    """Length of the end of the text in which every character is that of `size` before."""
    start = len(text) - size
    while start > 0 and text[start - 1] == text[start - 1 + size]:
        start -= 1
    return len(text) - start


def _same_line(text: str) -> bool:
    lines = [_MARKER.sub("", line).strip() for line in text.splitlines()]
    worded = [line for line in lines if _WORD.search(line)]
    most = max(map(worded.count, set(worded)), default=0)
    return most >= LEAST_LINES and most > len(worded) / 2
