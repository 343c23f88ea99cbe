"""The refusing SmolLM2 and its conversion in every inference stack, and the table of what was measured."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.real.support import built, converted_once
from tests.stacks.asking import Agreement, Answers, Questions, agreement, ask, questions
from tests.stacks.stacks import EVERYTHING, REFERENCE, STACKS, Stack, to_gguf

ROW, PULLED = "stack", "pulled"
TABLES = {ROW: "inference stacks", PULLED: "pushed to a Hub, pulled from it, and served"}
"""What tests record rows of, and what the tables are called."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They use a real model, too."""
    for item in items:
        if Path(str(item.fspath)).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.stacks)
            item.add_marker(pytest.mark.real)


@dataclass(frozen=True)
class Served:
    """A stack with the checkpoint before and after the conversion.

    Attributes:
        agreement: of the converted one with transformers in float32. `agreement_before`: the same of the base, which
            says how much of a difference is the stack's own.
    """

    stack: Stack
    base: Answers
    converted: Answers
    agreement: Agreement
    agreement_before: Agreement

    @property
    def row(self) -> Mapping[str, str]:
        """For the table."""
        alike, before = self.agreement, self.agreement_before
        return {
            "stack": self.stack.name,
            "weights": self.stack.form,
            "refused before": _percent(self.base),
            "refused after": _percent(self.converted),
            "same first token": f"{share(before, 1)} → {share(alike, 1)}",
            "same first 16": f"{share(before, 16)} → {share(alike, 16)}",
            "leading tokens": f"{before.mean:.1f} → {alike.mean:.1f}",
            **effort(self.converted),
        }


def share(found: Agreement, count: int) -> str:
    """Of answers with the same first tokens, for a table."""
    return f"{100 * found.first(count):.0f} %"


def effort(answers: Answers) -> Mapping[str, str]:
    """What it took, and of which versions, for a table."""
    return {
        "load + answer, s": " + ".join(f"{answers.seconds[key]:.0f}" for key in ("load", "answer")),
        "versions": ", ".join(f"{name} {version}" for name, version in answers.versions.items()),
    }


def needed(stack: Stack) -> None:
    """Ends the test where a stack is not there: as skipped, or as failed where every one has to be."""
    if stack.missing is not None:
        (pytest.fail if EVERYTHING else pytest.skip)(stack.missing)


def _percent(answers: Answers) -> str:
    rate = answers.refusals
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


@pytest.fixture(scope="session")
def subject() -> Path:
    """The refusing SmolLM2-135M-Instruct."""
    return built("subject.py", "refusing-smollm2-135m")


@pytest.fixture(scope="session")
def converted(subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its conversion. ABLITERATE_TEST_CONVERTED names a folder that holds one already."""
    given = os.environ.get("ABLITERATE_TEST_CONVERTED")
    return Path(given) if given else converted_once(subject, tmp_path_factory).folder


@pytest.fixture(scope="session")
def asked(subject: Path) -> Questions:
    """Held-out prompts."""
    return questions(subject)


@pytest.fixture(scope="session")
def answers(asked: Questions, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Stack, Path], Answers]:
    """Asks a stack once."""
    work = tmp_path_factory.mktemp("gguf")

    @cache
    def found(stack: Stack, folder: Path) -> Answers:
        model = to_gguf(stack, folder, work) if stack.environment == "llama-cpp" else folder
        return ask(stack, model, asked)

    return found


@pytest.fixture(scope="session", params=STACKS, ids=str)
def served(
    request: pytest.FixtureRequest, subject: Path, converted: Path, answers: Callable[[Stack, Path], Answers]
) -> Served:
    """One stack after the other."""
    stack: Stack = request.param
    needed(stack)
    before, after = answers(stack, subject), answers(stack, converted)
    alike = [agreement(found, answers(REFERENCE, of)) for found, of in ((before, subject), (after, converted))]
    return Served(stack, before, after, alike[1], alike[0])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tables, as docs/serving.md has them."""
    reports = [each for found in terminalreporter.stats.values() for each in found]
    calls = [each for each in reports if isinstance(each, pytest.TestReport) and each.when == "call"]
    recorded = [pair for report in calls for pair in report.user_properties]
    for name, title in TABLES.items():
        rows = [row for key, row in recorded if key == name]
        if rows:
            terminalreporter.section(title)
            terminalreporter.line(f"| {' | '.join(rows[0])} |")
            terminalreporter.line(f"|{'---|' * len(rows[0])}")
            for row in rows:
                terminalreporter.line(f"| {' | '.join(row.values())} |")
