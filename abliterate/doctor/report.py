"""What was looked at, what was found, and how it is told without telling who or where."""

import getpass
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from abliterate.errors import one_line

Fact = str | int | bool | None
"""Sizes are whole numbers of bytes, under names that end in `_bytes`."""
USER = "<user>"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, and what to do about it.

    Attributes:
        level: `broken` where commands fail because of it, else `note`.
    """

    level: Literal["broken", "note"]
    what: str
    hint: str


@dataclass(frozen=True)
class Section:
    """Facts of one kind, and what is wrong among them."""

    name: str
    facts: Mapping[str, Fact]
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Examination:
    """Everything that `abliterate doctor` looked at."""

    sections: tuple[Section, ...] = field(default=())

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong, the worst first."""
        found = [finding for section in self.sections for finding in section.findings]
        return tuple(sorted(found, key=lambda finding: finding.level != "broken"))

    @property
    def broken(self) -> bool:
        """Whether some command cannot work here."""
        return any(finding.level == "broken" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = [{"level": each.level, "what": each.what, "hint": each.hint} for each in self.findings]
        return {
            "broken": self.broken,
            "findings": found,
            **{section.name: dict(section.facts) for section in self.sections},
        }


def anonymous(text: str | Path) -> str:
    """One line in which the home folder is `~`, and a folder that is named after the user is `<user>`."""
    shown, home = one_line(str(text)), _home()
    if home is not None:
        shown = shown.replace(f"{home}/", "~/")
        shown = "~" if shown == home else shown
    name = _user()
    return "/".join(USER if part == name else part for part in shown.split("/")) if name else shown


def _home() -> str | None:
    with suppress(RuntimeError):
        home = str(Path.home())
        return home if len(home) > 1 else None
    return None


def _user() -> str | None:
    with suppress(OSError, KeyError, ImportError):  # of a user id without a name, as in some containers
        return getpass.getuser()
    return None
