"""What is made of a stack's answers, and what is said of a stack that is not there."""

from pathlib import Path

import pytest

from tests.stacks import stacks
from tests.stacks.asking import Answers, agreement
from tests.stacks.stacks import STACKS, Stack


def answered(*tokens: tuple[int, ...]) -> Answers:
    return Answers(tokens, ("",) * len(tokens), (0,) * len(tokens), {}, {})


def test_tokens_count_up_to_the_first_other_one() -> None:
    one = answered((1, 2, 3, 4), (1, 2), (5,), ())
    found = agreement(one, answered((1, 2, 9, 4), (1, 2, 3), (5,), ()))
    assert found.leading == (2, 2, 1, 0)
    assert found.whole == (False, False, True, True)
    assert found.mean == 1.25
    assert (found.first(2), found.first(3)) == (1.0, 0.5)


@pytest.mark.parametrize("stack", [each for each in STACKS if each.environment], ids=str)
def test_what_is_not_installed_says_how_to_install_it(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "BUILD", tmp_path)
    monkeypatch.setattr(stacks, "EVERYTHING", True)
    assert stack.missing is not None and f"make stack-{stack.environment}" in stack.missing
    ready = tmp_path / "stacks" / str(stack.environment) / "ready"
    ready.parent.mkdir(parents=True)
    ready.touch()
    assert stack.missing is None
    monkeypatch.setattr(stacks, "EVERYTHING", False)
    assert (stack.missing is None) == stack.quick


def test_every_environment_has_its_requirements() -> None:
    """`make stacks` makes an environment of every file there."""
    files = {path.stem for path in (Path(__file__).parent / "requirements").glob("*.txt")}
    assert files == {each.environment for each in STACKS if each.environment}
