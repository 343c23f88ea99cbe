"""The long run's own parts: what it starts from passes, and it can be started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.checks import TARGETS, assert_confined, check_folder, check_header, check_index, confined
from tests.fuzz.seeds import SEPARATOR, seeds

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_pass(tmp_path: Path, target: str) -> None:
    with confined(tmp_path):
        for content in seeds(target):
            TARGETS[target](tmp_path, content)


def test_well_formed_seeds_are_read(tmp_path: Path) -> None:
    assert check_header(tmp_path / "a", seeds("header")[0]) is None
    assert check_index(tmp_path, seeds("index")[0]) is None
    for content in seeds("checkpoint")[:2]:
        assert check_folder(tmp_path, content.split(SEPARATOR)) is None


def test_what_is_opened_elsewhere_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.txt").touch()
    (tmp_path / "in/link").symlink_to("../out.txt")
    with pytest.raises(AssertionError, match=r"out\.txt"), confined(tmp_path / "in"):
        (tmp_path / "in/link").read_bytes()
    with confined(tmp_path):
        (tmp_path / "in/link").read_bytes()
    assert_confined()


@pytest.mark.timeout(120)
def test_the_long_run_starts(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "tests.fuzz.headers", "--target", "entries", "--seconds", "2"]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0 and "Done" in ran.stderr, ran.stderr
