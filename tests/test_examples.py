"""The examples, as they are run: on a pico model, with a recipe that is quick."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pico
from tests.commandline import OFFLINE, names

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
WORDS = [chr(code) for code in range(40, 100)]
QUICK = f"""
name: {{name}}
extends: {{base}}
calibration: {{{{train: 16, validation: 6, test: 4}}}}
direction: {{{{filter: false, refusal_tokens: {json.dumps(WORDS)}, positions: 2}}}}
selection: {{{{max_kl: 1000000.0, min_induce: -1000000.0}}}}
evaluation: {{{{max_new_tokens: 2, kl_tokens: 2}}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and recipes."""
    folder = tmp_path_factory.mktemp("examples")
    pico.save(folder / "base", "llama", tokenizer=True)
    for base in ("refusal", "projected"):
        (folder / f"{base}.yaml").write_text(QUICK.format(name=base, base=base))
    return folder


def run(place: Path, name: str, *words: str) -> str:
    """What an example prints; it is run from another folder than its own."""
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in here for path in EXAMPLES.glob("*.py"))


def test_find_direction(place: Path) -> None:
    said = run(place, "find_direction.py", "base", "--recipe", "refusal.yaml", "--out", "scores.png")
    assert said.startswith("picked position -") and "wrote scores.png" in said
    assert (place / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_convert(place: Path) -> None:
    said = run(place, "convert.py", "base", "out", "--recipe", "refusal.yaml", "--tokens", "4")
    assert "no component along r at any layer" in said and "harmful prompts refused: " in said
    assert "abliteration.json" in names(place / "out")


def test_compare_recipes_on_prompts_of_your_own(place: Path) -> None:
    for kind in ("mine", "others"):
        (place / f"{kind}.txt").write_text("".join(f"{kind} {number}\n" for number in range(30)))
    sources = ("--harmful", "mine.txt", "--harmless", "others.txt")
    said = run(place, "compare_recipes.py", "base", "report", "--recipes", "refusal.yaml,projected.yaml", *sources)
    assert [line.split()[0] for line in said.splitlines()][:2] == ["refusal", "projected"]
    assert "comparison.html" in names(place / "report")


def test_audit(place: Path) -> None:
    small = ("--recipe", "refusal.yaml", "--prompts", "2", "--directions", "2")
    said = run(place, "audit.py", "base", "audit", *small)
    assert said.startswith("- ") and "audit.html" in names(place / "audit")


def test_another_concept_than_refusal(place: Path) -> None:
    said = run(place, "other_concept.py", "base", "french", "--recipe", "refusal.yaml")
    assert "log-odds of a French start" in said and "no component along r at any layer" in said
    prompts = json.loads((place / "french" / "abliteration.json").read_text())["calibration"]
    assert "french.txt" in json.dumps(prompts)


def test_prompts_come_in_pairs() -> None:
    """Of the French and the English there are as many, and more than the recipe takes."""
    both = [
        (EXAMPLES / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        for name in ("french", "english")
    ]
    assert len(both[0]) == len(both[1]) == 40 and not set(both[0]) & set(both[1])
