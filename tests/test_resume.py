"""A conversion that was stopped goes on where it was: to the same bytes, unless it is another conversion."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abliterate import conversion, identity, studying
from abliterate.checkpoint import shard
from abliterate.checkpoint.workfolder import WorkFolder, held
from abliterate.errors import CheckpointError
from abliterate.journal import Journal
from tests import pico
from tests.commandline import Ran, names, run_here, snapshot

WORK = ".out.abliterate-work"
RECIPE = """
name: quick
calibration: {train: 16, validation: 4, test: 4}
direction: {filter: false, refusal_tokens: [I, S], positions: 2}
selection: {max_kl: 1000000.0, min_induce: -1000000.0}
evaluation: {max_new_tokens: 2}
"""
STAGES = [
    "refusal tokens", "harmful means", "harmless means", "scores of finalists", "selection", "calibration",
    "stream before", "evaluation before", "stream after", "evaluation after",
]  # fmt: skip
Words = tuple[str | Path, ...]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pico.save(tmp_path_factory.mktemp("resume") / "base", "llama", tied=True, shards=2, tokenizer=True)
    (folder / "README.md").write_text("# Base\n")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def room(tmp_path: Path) -> Path:
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


def command(base: Path, room: Path, recipe: Path, *more: str | Path) -> Words:
    return ("convert", base, room / "out", "--recipe", recipe, *more)


@pytest.fixture(scope="module")
def undisturbed(base: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    room = tmp_path_factory.mktemp("undisturbed")
    assert run_here(*command(base, room, recipe, "-q")) == Ran(0, "", "")
    return snapshot(room / "out")


class Stopped(BaseException):
    """A kill, as far as it can be had in one process."""


def stopping(monkeypatch: pytest.MonkeyPatch, after: int, raised: BaseException) -> None:
    """The run ends once so many stages and shards are written down; none is afterwards, whatever threads there are."""
    real, written = Journal._write, []

    def write(journal: Journal) -> None:
        written.append(journal)
        if len(written) <= after:
            real(journal)
        if len(written) >= after:
            raise raised

    monkeypatch.setattr(Journal, "_write", write)


@pytest.fixture(scope="module")
def left(base: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run left that was stopped after its first shard."""
    room = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, STAGES.index("stream after") + 1, KeyboardInterrupt())
        ran = run_here(*command(base, room, recipe))
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "interrupted: run the same command again to continue")
    assert names(room) == [WORK] and done_shard(room / WORK).is_file()
    return room


def done_shard(work: Path) -> Path:
    """The one shard that is finished."""
    (name,) = json.loads((work / "journal.json").read_text())["shards"]
    return work / "out" / name


@pytest.fixture
def stopped(left: Path, room: Path) -> Path:
    """A copy of it."""
    shutil.copytree(left / WORK, room / WORK)
    return room


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that are loaded."""
    seen, real = [], studying.load_model

    def load(subject: Any, *given: Any, **named: Any) -> Any:
        seen.append(subject.name)
        return real(subject, *given, **named)

    for room in (studying, conversion):
        monkeypatch.setattr(room, "load_model", load)
    return seen


def test_stopped_after_everything_that_can_be_finished(
    base: Path, room: Path, recipe: Path, undisturbed: dict[str, bytes], loaded: list[str]
) -> None:
    """Each run finishes one thing more; none is done twice; the base is loaded only while something needs it."""
    before = snapshot(base)
    done: list[str] = []
    for _ in range(40):
        with pytest.MonkeyPatch.context() as patch:
            stopping(patch, 1, Stopped())
            loaded.clear()
            try:
                conversion.convert(str(base), room / "out", recipe=str(recipe))
                break
            except Stopped:
                pass
        journal = json.loads((room / WORK / "journal.json").read_text())
        new = [*journal["stages"], *journal["shards"]]
        assert len(new) == len(done) + 1 and not (room / "out").exists()
        assert ("base" in loaded) == (len(done) < STAGES.index("stream after")), loaded
        assert set(done) <= set(new)
        done = new
    assert sorted(done) == sorted([*STAGES, *(path.name for path in base.glob("*.safetensors"))])
    assert names(room) == ["out"] and snapshot(room / "out") == undisturbed
    assert snapshot(base) == before


def test_it_says_that_it_continues(
    base: Path, stopped: Path, recipe: Path, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    assert run_here(*command(base, stopped, recipe)).code == 0
    assert "continuing a run that was stopped: 8 stages and 1 shards are done" in caplog.messages
    assert names(stopped) == ["out"] and snapshot(stopped / "out") == undisturbed


def test_overwriting_continues_too(
    base: Path, stopped: Path, recipe: Path, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (stopped / "out").mkdir()
    (stopped / "out" / "config.json").write_text("{}")
    assert run_here(*command(base, stopped, recipe)).err.startswith(f"error: {stopped / 'out'} is not empty")
    assert WORK in names(stopped)
    assert run_here(*command(base, stopped, recipe, "--overwrite")).code == 0
    assert "continuing a run that was stopped" in caplog.text
    assert names(stopped) == ["out"] and snapshot(stopped / "out") == undisturbed


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda work: flip(done_shard(work)), "is not as it was written: it is written again"),
        (lambda work: done_shard(work).unlink(), "is not as it was written: it is written again"),
        (lambda work: flip(work / "stages" / "selection.safetensors"), "stage selection is damaged in"),
        (lambda work: (work / "stages" / "harmful-means.safetensors").unlink(), "stage harmful means is damaged in"),
        (lambda work: (work / "out" / "model-x.safetensors").touch(), "continuing"),
        (lambda work: (work / "out" / "sub").mkdir(), "continuing"),
    ],
)
def test_what_is_damaged_is_not_trusted(
    base: Path,
    stopped: Path,
    recipe: Path,
    undisturbed: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    damage(stopped / WORK)
    assert run_here(*command(base, stopped, recipe)).code == 0
    assert said in caplog.text
    assert names(stopped) == ["out"] and snapshot(stopped / "out") == undisturbed


def other_prompts(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(f"Say the number {number} aloud" for number in range(60)))
    return path


def other_recipe(tmp_path: Path) -> Path:
    (tmp_path / "quick.yaml").write_text(RECIPE + "edit: {strength: 0.5}\n")
    return tmp_path / "quick.yaml"


CHANGES: dict[str, tuple[Callable[[Path, Path], Words], str]] = {
    "recipe": (lambda base, tmp: ("--recipe", other_recipe(tmp)), r"\(recipe: edit\.strength is 0\.5, was 1\.0\)"),
    "prompts": (lambda base, tmp: ("--harmful", other_prompts(tmp)), r"\(recipe: calibration\.harmful"),
    "options": (lambda base, tmp: ("--batch-size", "3"), r"\(options: batch_size is 3, was null\)"),
    "evaluate": (lambda base, tmp: ("--no-evaluate",), r"\(options: evaluate is false, was true\)"),
    "dtype": (lambda base, tmp: ("--dtype", "bfloat16"), r'\(options: dtype is "bfloat16", was "float32"\)'),
    "base": (lambda base, tmp: (base / "README.md").write_text("#") and (), r"\(files of the base: README\.md\)"),
    "shard": (lambda base, tmp: flip(first_shard(base)) or (), r"\(files of the base: model-00001-of-"),
    "file": (lambda base, tmp: (base / "more.txt").touch() or (), r"\(files of the base: more\.txt\)"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_another_conversion_is_not_mixed_in(
    base: Path, stopped: Path, recipe: Path, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = shutil.copytree(base, tmp_path / "base")
    before = snapshot(stopped)
    apply, words = CHANGES[change]
    ran = run_here(*command(own, stopped, recipe, *apply(own, tmp_path)))
    assert (ran.code, ran.out) == (1, "") and ran.err.count("\n") == 1
    assert re.match(rf"error: .*{WORK} holds unfinished work of another run {words}", ran.err), ran.err
    assert ran.err.endswith("; run that command again to finish it, or add --overwrite to start anew\n")
    assert snapshot(stopped) | {f"{WORK}/lock": b""} == before | {f"{WORK}/lock": b""}
    assert "removed" not in caplog.text


def test_a_prompt_file_that_has_changed(
    base: Path, room: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same words on the command line, and other prompts."""
    words = command(base, room, recipe, "--harmful", other_prompts(tmp_path))
    with monkeypatch.context() as patch:
        stopping(patch, 1, KeyboardInterrupt())
        assert run_here(*words).code == 130
    path = tmp_path / "mine.txt"
    path.write_text(path.read_text().replace("number 7 ", "number seven "))
    assert "another run (prompts: harmful." in run_here(*words).err


def test_other_versions(base: Path, stopped: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = identity.versions()
    monkeypatch.setattr(identity, "versions", lambda: real | {"torch": "9.9"})
    assert f'(versions: torch is "9.9", was "{real["torch"]}")' in run_here(*command(base, stopped, recipe)).err


def test_a_base_that_only_its_hash_tells(
    base: Path, stopped: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large shard the fingerprint sees samples; those that are done are hashed whole."""
    own = shutil.copytree(base, tmp_path / "base")
    name = done_shard(stopped / WORK).name
    flip(own / name, -5)
    monkeypatch.setattr(identity, "fingerprint", lambda _: {})
    journal = stopped / WORK / "journal.json"
    rewritten(journal)
    ran = run_here(*command(own, stopped, recipe))
    assert f"another run (files of the base: {name})" in ran.err


def rewritten(journal: Path) -> None:
    """Has the journal speak of no files."""
    from abliterate.journal import read_journal

    found = read_journal(WorkFolder(journal.parent, journal.parent.with_name("out")))
    assert found is not None
    found.identity = {**found.identity, "files of the base": {}}
    found._write()


def test_the_same_base_in_another_place(base: Path, stopped: Path, recipe: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base, tmp_path / "elsewhere" / "base")
    assert run_here(*command(moved, stopped, recipe, "-q")) == Ran(0, "", "")


def test_a_run_that_was_killed_between_publishing_and_cleaning_up(
    base: Path, stopped: Path, recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """OUT is there, and the next run says so, as of any OUT; what lies beside it is cleaned up, and that is said."""
    (stopped / WORK / "out").rename(stopped / "out")
    (stopped / "out" / "config.json").touch()
    assert "is not empty" in run_here(*command(base, stopped, recipe)).err
    assert "killed after it had finished: it is removed" in caplog.text
    assert names(stopped) == ["out"]


def test_ctrl_c_after_out_was_done(base: Path, stopped: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(work: WorkFolder) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "remove", interrupted)
    ran = run_here(*command(base, stopped, recipe))
    assert (ran.code, ran.err.strip()) == (130, f"interrupted: {stopped / 'out'} was done by then")
    assert (stopped / "out" / "abliteration.json").is_file()


def test_overwriting_starts_anew_where_it_is_another(
    base: Path, stopped: Path, recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = command(base, stopped, recipe, "--no-evaluate", "--overwrite")
    assert run_here(*words).code == 0
    assert f"what an earlier command left unfinished in {stopped / WORK} is removed" in caplog.text
    assert names(stopped) == ["out"]


def test_a_damaged_journal(base: Path, stopped: Path, recipe: Path, undisturbed: dict[str, bytes]) -> None:
    flip(stopped / WORK / "journal.json", 40)
    before = snapshot(stopped / WORK / "stages")
    ran = run_here(*command(base, stopped, recipe))
    assert ran.code == 1 and "another run (its journal is damaged)" in ran.err
    assert snapshot(stopped / WORK / "stages") == before
    assert run_here(*command(base, stopped, recipe, "--overwrite", "-q")) == Ran(0, "", "")
    assert names(stopped) == ["out"] and snapshot(stopped / "out") == undisturbed


@pytest.mark.parametrize("raised", [MemoryError(), ValueError("a mistake"), None])
def test_what_may_go_better_next_time_keeps_what_is_done(
    base: Path,
    stopped: Path,
    recipe: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """None: a fault of the device in code of a library, which wraps it."""

    def fail(*_: object) -> None:
        if raised is None:
            raise CheckpointError("transformers cannot load it") from RuntimeError("unspecified launch failure")
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "prove", fail)
        try:
            assert run_here(*command(base, stopped, recipe)).code == 1
        except ValueError as error:
            assert error is raised
    assert names(stopped) == [WORK]
    assert f"what is finished is kept in {stopped / WORK}: the same command goes on from there" in caplog.messages
    assert run_here(*command(base, stopped, recipe, "-q")) == Ran(0, "", "")
    assert snapshot(stopped / "out") == undisturbed


def test_what_would_go_the_same_way_keeps_nothing(base: Path, room: Path, tmp_path: Path) -> None:
    """Calibration is finished but for the pick, and no pick passes: nor will it the next time."""
    strict = RECIPE.replace("max_kl: 1000000.0", "max_kl: 0.0, strict: true")
    (tmp_path / "strict.yaml").write_text(strict)
    ran = run_here(*command(base, room, tmp_path / "strict.yaml"))
    assert ran.code == 1 and "no direction passes" in ran.err
    assert names(room) == []


def test_a_disk_that_fills_up_in_the_second_shard(
    base: Path, stopped: Path, recipe: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = done_shard(stopped / WORK).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(shard, "write_all", full)
        ran = run_here(*command(base, stopped, recipe))
    assert ran.code == 1 and "disk full (No space left on device)" in ran.err
    assert done_shard(stopped / WORK).read_bytes() == kept
    assert run_here(*command(base, stopped, recipe, "-q")) == Ran(0, "", "")
    assert snapshot(stopped / "out") == undisturbed


def test_a_second_run_is_told(base: Path, stopped: Path, recipe: Path) -> None:
    before = snapshot(stopped / WORK / "stages")
    with held(WorkFolder.of(stopped / "out")):
        for more in ((), ("--overwrite",)):
            ran = run_here(*command(base, stopped, recipe, *more))
            told = f"error: another run (process {os.getpid()} on "
            assert ran.code == 1 and ran.err.startswith(told) and ran.err.count("\n") == 1
        assert "another run is writing" in run_here(*command(base, stopped, recipe, "--dry-run")).err
    assert snapshot(stopped / WORK / "stages") == before


def test_a_dry_run_tells_what_is_left(base: Path, stopped: Path, recipe: Path) -> None:
    before = snapshot(stopped)
    ran = run_here(*command(base, stopped, recipe, "--dry-run"))
    assert ran.code == 0
    assert "; a run that was stopped would be continued (8 stages and 1 shards are done); nothing was" in ran.out
    other = run_here(*command(base, stopped, recipe, "--dry-run", "--no-evaluate"))
    assert other.code == 1 and "holds unfinished work of another run (options: evaluate is false" in other.err
    over = run_here(*command(base, stopped, recipe, "--dry-run", "--no-evaluate", "--overwrite"))
    assert over.code == 0 and "; what an earlier command left unfinished would be removed; nothing was" in over.out
    assert snapshot(stopped) == before


def test_one_run_at_an_out_says_nothing_of_others(
    base: Path, room: Path, recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "abliterate")
    assert "stopped" not in run_here(*command(base, room, recipe, "--dry-run")).out
    assert run_here(*command(base, room, recipe, "--no-evaluate")).code == 0
    assert not [text for text in caplog.messages if "continu" in text or "removed" in text or "kept" in text]


def test_where_weights_are_makes_no_difference(
    base: Path, stopped: Path, room: Path, recipe: Path, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Streamed from the first to the last, and streamed after what began in memory."""
    for place in (room.parent / "other", stopped):
        place.mkdir(exist_ok=True)
        ran = run_here(*command(base, place, recipe, "--memory", "streamed"))
        assert ran.code == 0
        assert re.search(r"each of up to 2 new tokens reads .* --max-new-tokens", caplog.text)
        assert snapshot(place / "out") == undisturbed


def test_fewer_new_tokens_are_another_conversion(base: Path, stopped: Path, recipe: Path) -> None:
    ran = run_here(*command(base, stopped, recipe, "--max-new-tokens", "1"))
    assert ran.code == 1 and "max_new_tokens is 1, was null" in ran.err
    assert run_here(*command(base, stopped, recipe, "--max-new-tokens", "1", "--overwrite")).code == 0
    manifest = json.loads((stopped / "out" / "abliteration.json").read_text())
    assert manifest["evaluation"]["edited"]["max_new_tokens"] == 1 and "--max-new-tokens 1" in str(manifest)


def test_a_dry_run_says_where_weights_would_be(base: Path, room: Path, recipe: Path) -> None:
    for memory, said in (("auto", "kept in memory"), ("streamed", "streamed layer by layer"), ("1MB", "do not fit")):
        ran = run_here(*command(base, room, recipe, "--dry-run", "--memory", memory))
        assert ran.code == 0 and said in ran.out and names(room) == []


@pytest.mark.parametrize("memory", ["lots", "-1", "0GB", ""])
def test_a_memory_that_is_none(base: Path, room: Path, recipe: Path, memory: str) -> None:
    ran = run_here(*command(base, room, recipe, "--memory", memory))
    assert ran.code == 2 and "a size such as 16GB" in ran.err and names(room) == []
