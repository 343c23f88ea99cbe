"""A patch gives the files of a conversion again, to the byte, or nothing."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate import conversion
from abliterate.edit.payers import Payers
from abliterate.errors import AbliterateError, CheckpointError, OutputError, PatchError
from abliterate.patch import applying
from abliterate.patch.applying import apply_patch
from abliterate.patch.file import read_patch
from abliterate.patch.making import make_patch
from abliterate.recipe import load_recipe
from abliterate.subject import RunOptions
from abliterate.verification import verify
from tests import pico
from tests.commandline import names, run_here, snapshot

CARD = "---\nlicense: mit\n---\n# Base\n"
RECIPE = "name: mine\nextends: refusal\nedit: {{{edit}}}\n"


def _base(folder: Path, family: str = "llama", **config: object) -> Path:
    pico.save(folder, family, dtype=torch.bfloat16, tokenizer=True, **config)  # type: ignore[arg-type]
    (folder / "README.md").write_text(CARD)
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("kept")
    return folder


def _convert(base: Path, out: Path, edit: str = "", **options: object) -> Path:
    recipe = out.parent / "mine.yaml"
    recipe.write_text(RECIPE.format(edit=edit))
    direction = pico.direction_file(out.parent / "r.safetensors")
    conversion.convert(
        str(base),
        out,
        recipe=load_recipe(str(recipe)),
        direction=direction,
        evaluate=False,
        **options,  # type: ignore[arg-type]
    )
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _base(tmp_path_factory.mktemp("base") / "base", tied=True, shards=3)


@pytest.fixture(scope="module")
def edited(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _convert(base, tmp_path_factory.mktemp("edited") / "edited")


@pytest.fixture(scope="module")
def patch(base: Path, edited: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("patch") / "a.patch"
    make_patch(str(base), edited, file)
    return file


@pytest.mark.parametrize(
    ("family", "tied", "shards", "edit"),
    [
        ("llama", True, 3, ""),
        ("llama", True, 1, "head: tied"),
        ("llama", False, 2, "strength: 0.7"),
        ("qwen2", False, 1, "norms: kept"),
        ("gemma3_text", True, 1, "attention: {peak: 0.4}, embeddings: kept"),
        ("gpt2", True, 1, "norms: kept, strength: 0.5"),
        ("mixtral", False, 2, ""),
        ("minimax", False, 1, ""),
    ],
)
def test_the_same_files(family: str, tied: bool, shards: int, edit: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", family, tied=tied, shards=shards)
    edited = _convert(base, tmp_path / "edited", edit)
    make_patch(str(base), edited, tmp_path / "a.patch")
    applied = apply_patch(tmp_path / "a.patch", str(base), tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(edited)
    assert set(applied.files) == set(snapshot(edited)) and not applied.redrawn
    assert (tmp_path / "a.patch").stat().st_size < 20_000


def test_a_calibrated_conversion(tmp_path: Path) -> None:
    """All but the grid in the direction's file and its hash in the manifest; with --whole those too."""
    base = _base(tmp_path / "base")
    quick = tmp_path / "quick.yaml"
    quick.write_text(
        "name: quick\ncalibration: {train: 8, validation: 2, test: 1}\n"
        "direction: {filter: false, refusal_tokens: [I, S], positions: 2}\n"
        "selection: {max_kl: 1000000.0, min_induce: -1000000.0}\n"
    )
    edited, file = tmp_path / "edited", tmp_path / "a.patch"
    options = RunOptions(batch_size=4)
    conversion.convert(str(base), edited, recipe=load_recipe(str(quick)), options=options, evaluate=False, patch=file)
    again = make_patch(str(base), edited, tmp_path / "b.patch")
    assert file.read_bytes() == (tmp_path / "b.patch").read_bytes() and not again.about.whole
    apply_patch(file, str(base), tmp_path / "out")
    before, after = snapshot(edited), snapshot(tmp_path / "out")
    assert before.keys() == after.keys() and "selection.png" in before
    assert {name for name in before if before[name] != after[name]} == {
        "abliteration.json",
        "refusal_direction.safetensors",
    }
    manifests = [json.loads(found["abliteration.json"]) for found in (before, after)]
    assert manifests[0]["direction"].pop("sha256") != manifests[1]["direction"].pop("sha256")
    assert manifests[0] == manifests[1]
    assert verify(str(tmp_path / "out")).holds
    make_patch(str(base), edited, tmp_path / "c.patch", whole=True)
    apply_patch(tmp_path / "c.patch", str(base), tmp_path / "whole")
    assert snapshot(tmp_path / "whole") == before


def test_a_plot_that_is_drawn_otherwise_is_told(
    tmp_path: Path, base: Path, edited: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = shutil.copytree(edited, tmp_path / "edited")
    (changed / "search.png").write_bytes(b"of another version")
    with caplog.at_level(logging.WARNING), pytest.raises(PatchError, match=r"search\.png does not come out"):
        make_patch(str(base), changed, tmp_path / "a.patch")
        apply_patch(tmp_path / "a.patch", str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_patch_is_a_direction_file(base: Path, edited: Path, patch: Path, tmp_path: Path) -> None:
    conversion.convert(str(base), tmp_path / "out", direction=patch, evaluate=False)
    for file in edited.glob("model*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "name", ["model-00002-of-*.safetensors", "config.json", "tokenizer.json", "README.md", "notes/a.txt"]
)
def test_another_base_is_refused_by_name(base: Path, patch: Path, name: str, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    name = next(base.glob(name)).relative_to(base).as_posix()
    content = bytearray((other / name).read_bytes())
    content[-2] ^= 1
    (other / name).write_bytes(content)
    with pytest.raises(AbliterateError, match=name.replace(".", r"\.")):
        apply_patch(patch, str(other), tmp_path / "out")
    assert names(tmp_path) == ["other"]
    (other / name).unlink()
    with pytest.raises(AbliterateError, match=name.replace(".", r"\.")):
        apply_patch(patch, str(other), tmp_path / "out")
    assert names(tmp_path) == ["other"]


def test_what_the_base_has_beside_is_left_out(
    base: Path, edited: Path, patch: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = shutil.copytree(base, tmp_path / "more")
    (more / "extra.txt").write_text("new")
    apply_patch(patch, str(more), tmp_path / "out")
    assert "extra.txt is left out" in caplog.text
    assert snapshot(tmp_path / "out") == snapshot(edited)


def test_other_arithmetic_makes_nothing(
    base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another version would have it."""
    real = Payers.settle
    monkeypatch.setattr(Payers, "settle", lambda *given: real(*given) * 2)
    with pytest.raises(PatchError, match=r"made by abliterate .* torch .* and this is"):
        apply_patch(patch, str(base), tmp_path / "out")
    assert names(tmp_path) == []


def test_another_list_of_targets_makes_nothing(
    base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.patch import rebuild

    fewer = lambda *given: dict(list(real(*given).items())[1:])  # noqa: E731
    real = rebuild.build_edits
    monkeypatch.setattr(rebuild, "build_edits", fewer)
    with pytest.raises(PatchError, match=r"edits other tensors .*\(model.embed_tokens.weight\)"):
        apply_patch(patch, str(base), tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "notes/a.txt", "README.base.md"])
def test_a_folder_that_was_changed_gives_no_patch(base: Path, edited: Path, name: str, tmp_path: Path) -> None:
    changed = shutil.copytree(edited, tmp_path / "changed")
    with (changed / name).open("a") as file:
        file.write(" ")
    with pytest.raises(PatchError, match=name.replace(".", r"\.")):
        make_patch(str(base), changed, tmp_path / "a.patch")
    (changed / name).unlink()
    with pytest.raises(PatchError, match=name.replace(".", r"\.")):
        make_patch(str(base), changed, tmp_path / "a.patch")
    assert names(tmp_path) == ["changed"]


def test_weights_that_were_changed_give_no_patch(base: Path, edited: Path, tmp_path: Path) -> None:
    """Nor do those that are as a manifest says that was changed along."""
    changed = shutil.copytree(edited, tmp_path / "changed")
    shard = next(changed.glob("model-00002-of-*.safetensors"))
    tensors = load_file(shard)
    first = next(iter(tensors))
    tensors[first].view(-1)[0] += 1
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(PatchError, match=r"changed since .* model-00002-of-\d+\.safetensors"):
        make_patch(str(base), changed, tmp_path / "a.patch")
    manifest = json.loads((changed / "abliteration.json").read_text())
    for each in manifest["output"]["shards"]:
        each["sha256"] = None
    (changed / "abliteration.json").write_text(json.dumps(manifest))
    with pytest.raises(PatchError, match=r"model-00002-of-\d+\.safetensors does not come out as it is"):
        make_patch(str(base), changed, tmp_path / "a.patch")
    assert names(tmp_path) == ["changed"]


def test_a_file_of_the_users_own_stays_out(
    base: Path, edited: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = shutil.copytree(edited, tmp_path / "more")
    (more / "model.gguf").write_text("mine")
    make_patch(str(base), more, tmp_path / "a.patch")
    assert "model.gguf is not in the patch" in caplog.text
    apply_patch(tmp_path / "a.patch", str(base), tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(edited)


def test_places_that_cannot_be_written_are_told_first(base: Path, edited: Path, tmp_path: Path) -> None:
    out, direction = tmp_path / "out", pico.direction_file(tmp_path / "r.safetensors")
    with pytest.raises(OutputError, match="would lie in "):
        conversion.convert(str(base), out, direction=direction, evaluate=False, patch=out / "a.patch")
    (tmp_path / "a.patch").write_text("there")
    with pytest.raises(OutputError, match="is there already"):
        conversion.convert(str(base), out, direction=direction, evaluate=False, patch=tmp_path / "a.patch")
    with pytest.raises(OutputError, match="is there already"):
        make_patch(str(base), edited, tmp_path / "a.patch")
    assert names(tmp_path) == ["a.patch", "r.safetensors"]


class Stop(KeyboardInterrupt):
    """Ctrl-C at a certain moment."""


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """How many writes to the disk are still let through; then a run is stopped."""
    left = [float("inf")]
    real = os.fsync

    def fsync(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    yield left


def test_stopped_anywhere_it_goes_on(
    base: Path, edited: Path, patch: Path, tmp_path: Path, stopping: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write: OUT is not there until it is whole, and finished shards are not written again."""
    from abliterate.checkpoint import rewrite

    written: list[str] = []
    real = rewrite.write_shard
    monkeypatch.setattr(
        rewrite, "write_shard", lambda job, *rest: (written.append(job.source.path.name), real(job, *rest))[1]
    )
    wanted, steps, stopped = snapshot(edited), 0, 0
    while True:
        out = tmp_path / f"out{steps}"
        written.clear()
        stopping[0] = steps
        try:
            apply_patch(patch, str(base), out)
            break
        except Stop:
            stopped += 1
        stopping[0] = float("inf")
        if out.exists():
            assert snapshot(out) == wanted
        else:
            work = out.with_name(f".{out.name}.abliterate-work")
            journal = json.loads((work / "journal.json").read_text()) if (work / "journal.json").is_file() else None
            done = set(journal["shards"]) if journal else set()
            written.clear()
            apply_patch(patch, str(base), out)
            assert snapshot(out) == wanted and not done & set(written)
            shutil.rmtree(out)
        steps += 1
    assert stopped > 20


def test_the_command_line(base: Path, edited: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "a.patch", tmp_path / "out"
    ran = run_here("patch", base, edited, "-o", file, "--json")
    said = json.loads(ran.out)
    assert ran.code == 0 and said["bytes"] == file.stat().st_size and said["sha256"] == read_patch(file).sha256
    assert said["edit"]["tensors"] == len(read_patch(file).targets)
    assert run_here("patch", base, edited, "-o", file).code == 1
    shown = run_here("patch", base, edited, "-o", file, "--overwrite")
    assert shown.code == 0 and "KiB" in shown.out
    ran = run_here("apply", file, base, out, "--json")
    assert ran.code == 0 and set(json.loads(ran.out)["files"]) == set(snapshot(edited))
    ran = run_here("apply", file, base, out)
    assert ran.code == 1 and "not empty" in ran.err
    ran = run_here("apply", file, base, out, "--overwrite")
    assert ran.code == 0 and "as the patch names them" in ran.out
    assert snapshot(out) == snapshot(edited)
    assert run_here("apply", file, base, tmp_path / "quiet", "-q").out == ""
    assert "no patch" in run_here("apply", next(base.glob("*.safetensors")), base, tmp_path / "no").err


def test_convert_writes_one(base: Path, edited: Path, tmp_path: Path) -> None:
    direction = pico.direction_file(tmp_path / "r.safetensors")
    words = ("convert", base, tmp_path / "edited", "--direction", direction, "--no-evaluate", "-q")
    assert run_here(*words, "--patch", tmp_path / "a.patch", "--no-hash").code == 2
    assert run_here(*words, "--patch", tmp_path / "a.patch").code == 0
    assert run_here("apply", tmp_path / "a.patch", base, tmp_path / "out", "-q").code == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "edited")


def test_of_the_hub_the_very_commit_is_taken(patch: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the patch's own id, unless another is asked for; of another id whatever is there."""
    read = read_patch(patch)
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = replace(read, about=replace(read.about, base=replace(read.about.base, id="org/name", commit=commit)))
    asked: list[object] = []

    def located(model: str, revision: str | None, *_: object) -> None:
        asked.append((model, revision))
        raise CheckpointError("enough")

    monkeypatch.setattr(applying, "read_patch", lambda path: hub)
    monkeypatch.setattr(applying, "located", located)
    for model, revision in (("org/name", None), ("org/name", "main"), ("org/name@v1", None), ("org/other", None)):
        with pytest.raises(CheckpointError, match="enough"):
            apply_patch(patch, model, patch.parent / "out", revision=revision)
    assert asked == [("org/name", commit), ("org/name", "main"), ("org/name@v1", None), ("org/other", None)]
