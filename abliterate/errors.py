"""One small hierarchy of errors; the command line turns each into one line and exit code 1."""

from collections.abc import Iterable

MOST_CHARACTERS = 900
"""Of a message; its ends stay, which say where it happened and what to do."""


class AbliterateError(Exception):
    """Something the user can act on. The message is one line: what is wrong, and what to do.

    Names from files are in it: whatever they hold, nothing that moves a cursor or fills a screen comes out.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class CheckpointError(AbliterateError):
    """The files of a checkpoint are missing, damaged, forged, or of a kind that is not handled."""


class ArchitectureError(AbliterateError):
    """The residual writers of this model type are not known, or not all accounted for."""


class RefusedError(ArchitectureError):
    """No direction is exact on this architecture, and the reason is known.

    Attributes:
        why: the reason alone.
    """

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class RecipeError(AbliterateError):
    """A recipe names an unknown key or a value out of range."""


class CalibrationError(AbliterateError):
    """The calibration set or the chat template cannot be used."""


class SelectionError(AbliterateError):
    """No direction can be picked."""


class EditError(AbliterateError):
    """A direction cannot be projected out of a tensor."""


class PatchError(AbliterateError):
    """A patch is damaged, is of another base, or does not give the files that it was made from."""


class AdapterError(AbliterateError):
    """An edit, or a part of it, that no adapter can hold."""


class EvaluationError(AbliterateError):
    """A judge or a benchmark cannot be loaded or asked."""


class OutputError(AbliterateError):
    """The output folder cannot be used, or writing to it failed."""


class HubError(AbliterateError):
    """The Hub cannot be reached, or does not take what it is sent; nothing half-made is left there."""


def one_line(text: str) -> str:
    """Printable characters alone: blanks of any kind as a space, others as escapes, the middle cut out if too long."""
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:600]} … {text[-200:]}"
    text = text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:600]} … {text[-200:]}"


def _escape(character: str) -> str:
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def out_of_memory(error: BaseException) -> bool:
    """Of Python, of a device (a RuntimeError of torch's), or of torch's allocator on the CPU (a plain one)."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


def first_line(error: BaseException) -> str:
    """What an error of any library says, in one line: the first of its message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
