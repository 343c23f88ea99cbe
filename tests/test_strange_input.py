"""What was meant otherwise, or stopped: one line that says what to do, the exit code, and nothing half-written."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from abliterate import conversion, differing, inspecting, measuring, merged
from abliterate.patch import applying, making
from tests import pico
from tests.commandline import Ran, names, run_here, snapshot

QUICK = """
name: quick
calibration: {train: 8, validation: 2, test: 1}
direction: {filter: false, refusal_tokens: [I, S], positions: 1}
selection: {max_kl: 1000000.0, min_induce: -1000000.0}
evaluation: {max_new_tokens: 1, kl_tokens: 1}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several shapes, a conversion and its patch, and files that are none of what is asked for."""
    folder = tmp_path_factory.mktemp("strange")
    pico.save(folder / "base", "llama", tokenizer=True)
    pico.save(folder / "other", "gpt2", tokenizer=True)
    pico.save(folder / "wide", "llama", tokenizer=True, hidden_size=64)
    pico.save(folder / "mute", "llama")
    direction = pico.direction_file(folder / "r.safetensors")
    conversion.convert(str(folder / "base"), folder / "out", direction=direction, evaluate=False, patch=folder / "p")
    (folder / "empty.txt").touch()
    (folder / "text").write_text("hello")
    (folder / "quick.yaml").write_text(QUICK)
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder, in which a test must leave nothing."""
    monkeypatch.chdir(made)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(measuring, "neutral_paragraphs", lambda: ["A few words."])
    before = names(made)
    yield made
    assert names(made) == before


OFFLINE = (
    "nothere is not a folder here, not whole in the Hub's cache, and the Hub is not asked, since HF_HUB_OFFLINE is"
)
WRONG = {
    "evaluate nothere": OFFLINE,
    "evaluate base --baseline nothere": OFFLINE,
    "evaluate base/config.json": "is a file; give the folder of a checkpoint or a Hub id",
    "evaluate mute": "has no tokenizer",
    "evaluate base --harmful empty.txt": "empty.txt holds no prompts",
    "evaluate base --judge chat:mute --recipe quick.yaml": "mute is no judge: it has no chat template",
    "evaluate base --judge classifier:nothere": OFFLINE,
    "evaluate base --save-completions text": "text is there already; choose another name\n",
    "evaluate base --save-completions no/such": "make it first",
    "audit base -o text": "is a file; OUT names a folder to make",
    "audit base -o base/x": "lies inside the checkpoint that is read",
    "audit base -o out": "out is not empty; choose another OUT",
    "diff base nothere": OFFLINE,
    "diff base out --direction nothere": "no direction file nothere",
    "diff base out --direction text": "text is not a safetensors file",
    "diff base out --save-direction r.safetensors": "or replace it with --overwrite",
    "diff base base --save-direction new": "have no one direction in common",
    "inspect nothere": OFFLINE,
    "inspect p": "p is a file; give the folder of a checkpoint or a Hub id",
    "inspect out --base nothere": OFFLINE,
    "inspect out --base other": "out does not bear out its manifest: base",
    "inspect out --base wide": "out does not bear out its manifest: base",
    "patch base nothere -o new": "nothere has no abliteration.json",
    "patch other out -o new": "other is not what out was made from",
    "patch base out -o r.safetensors": "or replace it with --overwrite",
    "patch base out -o out/new": "would lie in out",
    "apply nothere base new": "no patch file nothere; make one with `abliterate patch`",
    "apply text base new": "text is damaged or no patch",
    "apply r.safetensors base new": "r.safetensors is no patch",
    "apply p other new": "other is not the base of the patch",
    "apply p wide new": "wide is not the base of the patch",
    "apply p base base": "is the checkpoint that is read; choose another OUT",
    "apply p base text": "is a file; OUT names a folder to make",
    "convert other new --adapter peft --direction nothere": "no direction file nothere",
    "convert wide new --adapter peft --direction r.safetensors": "direction has shape [48]",
    "convert base base/new --adapter peft --direction r.safetensors": "lies inside the checkpoint that is read",
    "convert nothere new --adapter peft --dry-run": OFFLINE,
}
USAGE = {
    "patch base p -o new": "Directory 'p' is a file",
    "patch base out -o base": "is a directory",
    "apply base base new": "is a directory",
    "evaluate base --cache-limit lots": "'lots' is not a size such as 100GB",
    "diff base": "Missing argument 'EDITED'",
    "convert base new --adapter peft --push-to a/b": "--push-to does not go with --adapter",
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("words", WRONG)
def test_one_line_says_what_to_do(words: str) -> None:
    ran = run_here(*words.split(), "-q")
    assert ran.code == 1 and WRONG[words] in ran.err, ran.err
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and not ran.out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("words", USAGE)
def test_wrong_usage(words: str) -> None:
    ran = run_here(*words.split())
    assert ran.code == 2 and USAGE[words] in ran.err and not ran.out


@pytest.mark.usefixtures("here")
def test_a_baseline_of_another_architecture_is_asked_about(caplog: pytest.LogCaptureFixture) -> None:
    assert run_here("evaluate", "base", "--baseline", "other", "--recipe", "quick.yaml", "--json").code == 0
    assert "base is llama and its baseline other is gpt2: is that meant?" in caplog.text


def stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


PLACES = {
    "evaluate base --save-completions new --recipe quick.yaml": (measuring, "evaluate_model"),
    "diff base out --save-direction new": (differing, "share"),
    "inspect out --base base": (inspecting, "mismatches"),
    "patch base out -o new": (making, "_prove_shards"),
    "convert base new --adapter peft --direction r.safetensors --no-evaluate": (merged, "certify_stream"),
}


@pytest.mark.parametrize("words", PLACES)
def test_ctrl_c_leaves_nothing(here: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*PLACES[words], stopped)
    ended(run_here(*words.split(), "-q"), "nothing was written")


def ended(ran: Ran, words: str) -> None:
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", f"interrupted: {words}")


def test_ctrl_c_once_the_answers_are_written(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "neutral_paragraphs", lambda: ["A few words."])
    monkeypatch.setattr(measuring, "_judged", stopped)
    words = ("evaluate", made / "base", "--save-completions", tmp_path / "new", "--recipe", made / "quick.yaml", "-q")
    ended(run_here(*words), f"{tmp_path / 'new'} was done by then")
    assert (tmp_path / "new").stat().st_size


def test_ctrl_c_while_applying_leaves_what_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("apply", made / "p", made / "base", tmp_path / "out", "-q")
    with monkeypatch.context() as patch:
        patch.setattr(applying, "write_rest", stopped)
        ran = run_here(*words)
    ended(ran, "run the same command again to continue")
    assert names(tmp_path) == [".out.abliterate-work"]
    assert run_here(*words).code == 0
    assert snapshot(tmp_path / "out") == snapshot(made / "out") and names(tmp_path) == ["out"]


def test_ctrl_c_while_an_adapter_is_evaluated_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "neutral_paragraphs", lambda: ["A few words."])
    words = ("convert", made / "base", tmp_path / "out", "--adapter", "peft", "--recipe", made / "quick.yaml", "-q")
    with monkeypatch.context() as patch:
        patch.setattr(merged, "evaluate_model", stopped)
        ran = run_here(*words)
    ended(ran, "run the same command again to continue")
    assert names(tmp_path) == [".out.abliterate-work"]
    with monkeypatch.context() as patch:
        patch.setattr("abliterate.find.mean_hidden", stopped)
        patch.setattr("abliterate.proving.load_model", stopped)
        assert run_here(*words).code == 0, "the direction and the stream were kept"
    shutil.move(tmp_path / "out", tmp_path / "first")
    assert run_here(*words).code == 0 and snapshot(tmp_path / "out") == snapshot(tmp_path / "first")
