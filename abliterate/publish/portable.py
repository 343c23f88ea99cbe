"""Takes the folders of this machine out of what is published; pure string work, nothing is looked up on disk."""

import re
import shlex
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# A rooted path inside free text: `~/a/` or `/a/b/` or `C:\a\`, not part of a URL, a relative path or a word.
_FOLDERS = re.compile(
    r"""(?<![\w/\\.:~-])(?:~[/\\]|[A-Za-z]:[/\\]|/(?=[^\s/'"]+/))(?:[^\s/\\'"`]+[/\\])*(?=[^\s/\\'"`])"""
)


def portable_name(text: str) -> str:
    """The last component when the whole text is a rooted path (`/data/set.jsonl:text` -> `set.jsonl:text`)."""
    posix = PurePosixPath(text)
    if posix.name and (posix.is_absolute() or text.startswith("~/")) and "\n" not in text:
        return posix.name
    windows = PureWindowsPath(text)
    return windows.name if windows.drive and windows.root and windows.name else text


def portable_text(text: str) -> str:
    """Free text with every rooted path in it reduced to its last component."""
    return _FOLDERS.sub("", text)


def portable_command(command: str) -> str:
    """A shell command with every argument that is a rooted path reduced to its last component.

    The text after `--system-prompt` is no path, whatever it looks like (`/no_think`), and stays.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return portable_text(command)
    before = ["", *words]
    return shlex.join(
        word if last == "--system-prompt" or word.startswith("--system-prompt=") else _portable_word(word)
        for last, word in zip(before, words, strict=False)
    )


def _portable_word(word: str) -> str:
    flag, equals, value = word.partition("=")
    return f"{flag}={portable_name(value)}" if equals and flag.startswith("--") else portable_name(word)


def portable_values(value: Any) -> Any:
    """Nested mappings and sequences with every string that is a rooted path reduced to its last component."""
    if isinstance(value, str):
        return portable_name(value)
    if isinstance(value, dict):
        return {key: portable_values(item) for key, item in value.items()}
    return [portable_values(item) for item in value] if isinstance(value, list) else value
