"""`abliterate doctor` on the terminal: facts in two columns, then what is wrong."""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from abliterate.doctor.report import Examination, Fact, Section
from abliterate.sizes import shown

_SIZE = "_bytes"


def doctor_view(found: Examination) -> RenderableType:
    """Everything that was looked at, and every finding with what to do about it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for section in found.sections:
        for number, (name, text) in enumerate(_lines(section)):
            table.add_row(Text(section.name if number == 0 else ""), Text(f"{name}: {text}"))
    if not found.findings:
        return Group(table, Text(), Text("nothing is wrong", "green"))
    return Group(table, Text(), *(_finding(each.level, each.what, each.hint) for each in found.findings))


def print_doctor(found: Examination) -> None:
    """The end of `abliterate doctor`."""
    Console(highlight=False, markup=False, emoji=False).print(doctor_view(found))


def _lines(section: Section) -> list[tuple[str, str]]:
    return [(_label(section.name, name), _text(name, fact)) for name, fact in section.facts.items()]


def _label(section: str, name: str) -> str:
    """Names of packages and variables as they are, others in words."""
    if section == "versions" or name.isupper():
        return name
    return name.removesuffix(_SIZE).replace("_", " ")


def _text(name: str, fact: Fact) -> str:
    if name.endswith(_SIZE):
        return shown(int(fact or 0))
    return "not installed" if fact is None else str(fact)


def _finding(level: str, what: str, hint: str) -> Text:
    style = "bold red" if level == "broken" else "yellow"
    return Text(f"{level}: ", style).append(f"{what}; {hint}", "default")
