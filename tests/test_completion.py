"""Completion as a shell does it: a real bash sources the script and asks for words."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from abliterate.cli import cli
from abliterate.recipe import recipe_names
from tests.commandline import run_here

ROOT = Path(__file__).parents[1]
SHIM = f"""#!{sys.executable}
import sys
sys.argv[0] = "abliterate"
from abliterate.cli import main
main()
"""
ASK = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={place}
_abliterate_completion "$1" 2>&1
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
BASH = shutil.which("bash") or ""
needs_bash = pytest.mark.skipif(not BASH, reason="needs bash 4.4 or newer")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the command on the path, its completion script, and a cache with one model."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "abliterate").write_text(SHIM)
    (tmp_path / "bin" / "abliterate").chmod(0o755)
    (tmp_path / "script").write_text(run_here("completion", "bash").out)
    (tmp_path / "hub" / "models--acme--tiny-chat").mkdir(parents=True)
    (tmp_path / "hub" / "datasets--acme--prompts").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def asked(room: Path, *words: str) -> list[str]:
    """What bash would offer for the last of the words."""
    listed = " ".join(f"'{word}'" for word in words)
    text = ASK.format(script=room / "script", words=listed, place=len(words) - 1)
    done = subprocess.run(
        [BASH, "--norc", "-c", text, "bash", words[0]], capture_output=True, text=True, timeout=60, cwd=room
    )
    assert done.returncode == 0, done.stderr
    # compopt is for a completion that bash itself called
    return [line for line in done.stdout.splitlines() if line and "compopt" not in line]


@needs_bash
def test_commands_and_options(room: Path) -> None:
    assert asked(room, "abliterate", "co") == ["compare", "completion", "convert"]
    assert asked(room, "abliterate", "convert", "--no-ev") == ["--no-evaluate"]
    assert asked(room, "abliterate", "convert", "--device", "m") == ["mps"]


@needs_bash
def test_recipes(room: Path) -> None:
    assert asked(room, "abliterate", "convert", "--recipe", "") == recipe_names()
    assert asked(room, "abliterate", "audit", "--recipe", "re") == ["refusal"]
    assert asked(room, "abliterate", "recipes", "norm") == ["norm-preserving"]


@needs_bash
def test_several_recipes_with_commas(room: Path) -> None:
    assert asked(room, "abliterate", "compare", "--recipes", "pro") == ["projected"]
    found = asked(room, "abliterate", "compare", "--recipes", "refusal,projected,")
    assert found == [f"refusal,projected,{name}" for name in recipe_names() if name not in ("refusal", "projected")]


@needs_bash
def test_models_of_the_cache(room: Path) -> None:
    assert asked(room, "abliterate", "plan", "ac") == ["acme/tiny-chat"]
    assert asked(room, "abliterate", "plan", "data") == []


MODELS = {"model", "checkpoint", "baseline", "base"}
MAKE_FOLDERS = {"apply", "convert", "compare", "audit"}


@pytest.mark.parametrize("command", cli.commands)
def test_folders_for_every_model_and_out(command: str) -> None:
    """Every command's own, so that one which is added later is asked for it too."""
    made = cli.commands[command]
    context = click.Context(made, help_option_names=["-h", "--help"])  # kept by the command: as it is given them
    for parameter in made.params:
        if parameter.name not in MODELS | {"out"}:
            continue
        kinds = {item.type for item in parameter.shell_complete(context, "x")}
        folder = parameter.name in MODELS or command in MAKE_FOLDERS
        wanted = {"dir"} if folder else {"dir", "file"}
        assert kinds & wanted, f"{command} {parameter.name}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_ask_the_program(shell: str) -> None:
    ran = run_here("completion", shell)
    assert (ran.code, ran.err) == (0, "")
    assert f"_ABLITERATE_COMPLETE={shell}_complete" in ran.out and "%(" not in ran.out


@needs_bash
def test_the_script_is_one_that_bash_can_read(room: Path) -> None:
    done = subprocess.run([BASH, "-n", str(room / "script")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_is_one_that_the_shell_can_read(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    (tmp_path / "script").write_text(run_here("completion", shell).out)
    done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_completing_loads_no_library() -> None:
    """Between a key and its answer there is no time for torch."""
    code = (
        "import sys, abliterate.cli; from abliterate.completing import complete_recipe, cached_models; "
        "complete_recipe(None, None, ''); cached_models(); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub', 'rich') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr
