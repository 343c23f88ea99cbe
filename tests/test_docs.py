"""What the documents name is there: commands with their options, files that are linked to, modules, recipes' keys."""

import contextlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import abliterate
from abliterate.cli import cli
from abliterate.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/*.md"),
     *ROOT.glob("tests/models/*.md")]
)  # fmt: skip
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^|[\s$;&(\"])abliterate (?=[a-z-])")
MODULE = re.compile(r"(?<!/)\b(?:abliterate|tests|benchmarks|examples|recipes|docs)/[\w./-]*[\w/]")
PLACEHOLDERS = {"A,B,...", "..."}


def page_ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(text: str) -> Iterator[str]:
    """Lines of code that start the program, and code within sentences that does; comments and pipes cut off."""
    for block in FENCE.findall(text):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if is_command(line))
    rest = FENCE.sub("", text)
    yield from (line for line in rest.splitlines() if line.startswith("    ") and is_command(line))
    yield from (" ".join(span.split()) for span in SPAN.findall(rest) if is_command(" ".join(span.split())))


def is_command(line: str) -> bool:
    return bool(re.match(r"\s*(\$ )?(\w+=\S+ )*abliterate \S", line)) or "$(abliterate " in line


def words_of(line: str) -> list[str]:
    """The words after `abliterate`, up to a comment, a pipe or a redirection."""
    said = re.split(r"\babliterate ", line, maxsplit=1)[1].partition(")")[0] if "$(" in line else line
    words = shlex.split(said.strip().removeprefix("$ "), comments=True)
    words = words[words.index("abliterate") + 1 :] if "abliterate" in words else words
    stops = [i for i, word in enumerate(words) if word in ("|", ">", "2>", "&&", ";")]
    return words[: stops[0]] if stops else words


def wrong_with(line: str) -> str | None:
    """Why the real command does not take the line; None where it does. Nothing runs: arguments alone are parsed."""
    words = [word for word in words_of(line) if word != "..."]
    if not words or words[0].startswith("-"):
        return parsed(cli, "abliterate", words)
    command = cli.commands.get(words[0])
    if command is None:
        return f"no command {words[0]}"
    # [optional], and the first of one|or|another
    return parsed(command, words[0], [word.strip("[]").partition("|")[0] for word in words[1:]])


def parsed(command: click.Command, name: str, words: list[str]) -> str | None:
    with contextlib.redirect_stdout(None):
        try:
            above = click.Context(cli, **cli.context_settings)  # a command keeps the help option that it is first given
            command.make_context(name, list(words), parent=above, resilient_parsing=False)
        except click.exceptions.Exit:
            return None
        except click.MissingParameter:  # a sentence may name a command and an option of it alone
            return None
        except click.UsageError as error:
            return error.format_message()
    return None


def test_pages_are_found() -> None:
    found = {page_ids(page) for page in PAGES}
    assert {"README.md", "docs/README.md", "docs/quickstart.md", "docs/faq.md", "CONTRIBUTING.md"} <= found
    assert len([line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]) > 40


@pytest.mark.parametrize(
    "line",
    ["abliterate convert MODEL OUT --no-such-option", "$ abliterate konvert MODEL OUT", "abliterate plan A B",
     "abliterate convert M O --memory lots", "X=1 abliterate recipes --jsn | less", "abliterate completion tcsh"],
)  # fmt: skip
def test_a_wrong_command_is_told(line: str) -> None:
    assert is_command(line) and wrong_with(line)


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_commands_are_what_the_program_takes(page: Path) -> None:
    lines = commands(page.read_text(encoding="utf-8"))
    wrong = {line: why for line in lines if (why := wrong_with(line))}
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            missing.append(target)
    assert not missing


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_files_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {word.rstrip("/.") for span in SPAN.findall(FENCE.sub("", text)) for word in MODULE.findall(span)}
    assert not {name for name in named if not (ROOT / name).exists()}


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_keys_of_recipes_that_are_named_are_there(page: Path) -> None:
    plain = load_recipe("refusal").as_dict()
    sections = {name for name, value in plain.items() if isinstance(value, dict)}
    keys = rf"`({'|'.join(sections)})\.(?!png`|json`)(\w+)[:`]"
    named = re.findall(keys, page.read_text(encoding="utf-8"))
    assert not {(section, key) for section, key in named if key not in plain[section]}


def test_signatures_in_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)\((.*?)\)` \|", page, re.MULTILINE)
    assert {name for name, _ in shown} == {name for name in abliterate.__all__ if name[0].islower()}
    for name, parameters in shown:
        real = inspect.signature(getattr(abliterate, name)).parameters.values()
        bare = [each.replace(annotation=inspect.Parameter.empty) for each in real]
        written = str(inspect.Signature(bare)).replace("'", '"')
        assert written == f"({parameters})", name
