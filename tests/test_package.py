"""The source archive and the wheel built from it: what is in them, and that the wheel's own files are enough to run."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from abliterate.recipe import recipe_names
from tests import pico
from tests.commandline import OFFLINE

ROOT = Path(__file__).parents[1]
TOP = {
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md",
    "pyproject.toml",
}  # fmt: skip
KINDS = (
    "py.typed", "families/dense.yaml", "parts.yaml", "templates/chatml.jinja", "harmful_train.jsonl", "neutral.txt",
    "card.md.jinja", "page.html.jinja", "manifest.schema.json", "recipes/refusal.yaml",
)  # fmt: skip
"""One of each kind of data that the package reads."""
LITTER = ("__pycache__", ".pyc", ".venv", ".hypothesis", "/build/")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist` makes, without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(dist.glob("*.whl")))


@pytest.fixture(scope="module")
def archived(dist: Path) -> set[str]:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def in_tree(folder: str) -> set[str]:
    """Files below a folder of the source tree, by their names from its top."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    names = {path.relative_to(ROOT).as_posix() for path in files}
    return {name for name in names if not any(part in f"/{name}" for part in LITTER)}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    recipes = {f"abliterate/{name}" for name in in_tree("recipes")}
    assert held == in_tree("abliterate") | recipes
    for kind in KINDS:
        assert any(name.endswith(kind) for name in held), kind


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    names = {name.partition(".dist-info/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in names
    said = Parser().parsestr(wheel.read(names["METADATA"]).decode())
    assert said["Name"] == "abliterate" and said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.11" and "torch>=2.6" in said.get_all("Requires-Dist", [])
    assert {"datasets", "parquet", "eval", "search"} <= set(said.get_all("Provides-Extra", []))
    assert wheel.read(names["entry_points.txt"]).decode().split() == [
        "[console_scripts]", "abliterate", "=", "abliterate.cli:main"
    ]  # fmt: skip


@pytest.mark.parametrize("folder", ["abliterate", "recipes", "tests", "benchmarks", "docs", "examples"])
def test_the_archive_holds_the_whole_source(archived: set[str], folder: str) -> None:
    missing = in_tree(folder) - archived
    assert not missing and in_tree(folder), missing


def test_the_archive_holds_what_goes_with_the_source(archived: set[str]) -> None:
    assert archived >= TOP
    assert not [name for name in archived if any(part in f"/{name}" for part in LITTER)]


def test_the_wheel_runs_without_the_source(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Its files alone, in a folder where nothing of the source tree is found."""
    wheel.extractall(tmp_path / "site")
    pico.save(tmp_path / "base", "llama", tokenizer=True)
    pico.direction_file(tmp_path / "r.safetensors")
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(tmp_path / "site")}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "abliterate", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = run("recipes")
    assert all(name in shown for name in recipe_names())
    assert "certificate  holds" in run("convert", "base", "out", "--direction", "r.safetensors", "--no-evaluate")
    where = [sys.executable, "-c", "import abliterate; print(abliterate.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    assert Path(found.strip()).is_relative_to(tmp_path / "site")
