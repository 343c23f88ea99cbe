"""`abliterate diff` as a user runs it: what it prints, how it ends, and what hostile files do to it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from abliterate.checkpoint.header import Header, TensorInfo
from tests import pico
from tests.commandline import run, run_here, snapshot
from tests.difference import editing

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffing") / "base"
    return pico.save(folder, "llama", dtype=torch.bfloat16, tied=True, shards=2, tokenizer=True)


@pytest.fixture(scope="module")
def edited(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return editing.changed(base, tmp_path_factory.mktemp("diffing") / "edited", editing.projected(pico.unit(seed=1)))


def test_the_table_names_the_kind_and_what_changed(base: Path, edited: Path) -> None:
    before = snapshot(base), snapshot(edited)
    ran = run_here("diff", base, edited)
    assert (ran.code, ran.err) == (0, "")
    for text in ("rank-1 projection", "one direction", "down_proj", "layers 0–2", "before", "after"):
        assert text in ran.out
    assert all(len(line) <= 80 for line in ran.out.splitlines())
    assert (snapshot(base), snapshot(edited)) == before


def test_json_alone_on_stdout(base: Path, edited: Path, tmp_path: Path) -> None:
    file = pico.direction_file(tmp_path / "r.safetensors", seed=1)
    ran = run("diff", base, edited, "--json", "--direction", file)
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["schema"] == "abliteration-diff/1" and found["verdict"]["kind"] == "projection"
    assert found["file"]["shared"] > 0.999 and len(found["shared"]["direction"]) == pico.HIDDEN
    changed = found["tensors"]["changed"]
    assert found["tensors"]["compared"] == found["tensors"]["same"] + len(changed)
    assert {tensor["rank"] for tensor in changed} == {1}
    assert all(tensor["spectrum"][0] > tensor["edge"] > tensor["spectrum"][1] for tensor in changed)


def test_writers_are_read_once_for_what_was_found_and_what_a_file_names(
    base: Path, edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.certify import weights

    read: list[tuple[Path, str]] = []
    blocks = weights.iter_blocks

    def noted(home: Header, info: TensorInfo) -> Iterator[tuple[slice, torch.Tensor]]:
        read.append((home.path, info.name))
        return blocks(home, info)

    monkeypatch.setattr(weights, "iter_blocks", noted)
    file = pico.direction_file(tmp_path / "r.safetensors", seed=2)
    found = json.loads(run_here("diff", base, edited, "--json", "--direction", file).out)
    recovered, named = found["removed"], found["file"]["removed"]
    assert [each["tensor"] for each in recovered] == [each["tensor"] for each in named]
    changed = [pair for pair in zip(recovered, named, strict=True) if pair[0]["changed"]]
    assert changed and all(one["after"] < 0.01 < two["after"] for one, two in changed)
    assert len(read) == len(set(read)) == len(recovered) + len(changed)


def test_quiet_says_nothing(base: Path, edited: Path) -> None:
    assert run_here("diff", base, edited, "-q").out == ""


def test_other_files_that_differ(base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    editing.configured(other, rope_theta=5.0, extra={"a": 1})
    (other / "generation_config.json").write_text('{"temperature": 0.5}')
    (other / "chat_template.jinja").write_text("another")
    (other / "added.txt").write_text("x")
    (other / "tokenizer_config.json").unlink()
    found = json.loads(run_here("diff", base, other, "--json").out)
    assert found["verdict"]["kind"] == "identical"
    keys = {key["key"]: (key["base"], key["edited"]) for key in found["files"]["config"]}
    assert keys["rope_theta"][1] == "5.0" and keys["extra.a"] == (None, "1")
    names = {file["name"] for file in found["files"]["changed"]}
    assert names == {"generation_config.json", "chat_template.jinja"}
    assert found["files"]["added"] == ["added.txt"] and found["files"]["missing"] == ["tokenizer_config.json"]
    table = run_here("diff", base, other).out
    for text in ("extra.a: – → 1", "temperature: – → 0.5", "chat_template.jinja", "added.txt"):
        assert text in table


def test_a_recovered_direction_is_written_and_not_over_a_file(base: Path, edited: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.safetensors"
    assert run_here("diff", base, edited, "--save-direction", file).code == 0
    assert abs(float(load_file(file)["direction"] @ pico.unit(seed=1))) > 0.999
    again = run_here("diff", base, edited, "--save-direction", file)
    assert again.code == 1 and "--overwrite" in again.err and again.err.count("\n") == 1
    assert run_here("diff", base, edited, "--save-direction", file, "--overwrite").code == 0


def test_no_direction_in_common_is_said(base: Path, tmp_path: Path) -> None:
    tuned = editing.changed(base, tmp_path / "t", editing.tuned())
    ran = run_here("diff", base, tuned, "--save-direction", tmp_path / "r.safetensors")
    assert ran.code == 1 and "no one direction" in ran.err and not (tmp_path / "r.safetensors").exists()


def _truncated(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])


def _absent(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def _outside(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../../etc/passwd.safetensors")
    (folder / INDEX).write_text(json.dumps(content))


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _bad_direction(folder: Path) -> None:
    pico.direction_file(folder / "refusal_direction.safetensors", hidden=7)


@pytest.mark.parametrize("harm", [_truncated, _absent, _outside, _no_config, _bad_direction])
def test_hostile_input_ends_in_one_line(base: Path, tmp_path: Path, harm: object) -> None:
    bad = shutil.copytree(base, tmp_path / "bad")
    harm(bad)  # type: ignore[operator]
    ran = run_here("diff", base, bad)
    assert ran.code == 1 and ran.out == ""
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and "Traceback" not in ran.err
    if harm is not _bad_direction:
        assert run_here("diff", bad, base).code == 1


def test_a_shard_that_shrinks_meanwhile(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is what the header said, or an error."""
    from abliterate.difference import measure

    bad = shutil.copytree(base, tmp_path / "bad")
    real = measure.survey

    def shrunk(matrix: object) -> object:
        _truncated(bad)
        return real(matrix)  # type: ignore[arg-type]

    tensors = editing.changed(base, tmp_path / "e", editing.tuned())
    monkeypatch.setattr(measure, "survey", shrunk)
    ran = run_here("diff", bad, tensors)
    assert ran.code == 1 and "changed while it was read" in ran.err


@pytest.mark.parametrize("words", [("diff",), ("diff", "a"), ("diff", "a", "b", "c"), ("inspect",)])
def test_wrong_usage(words: tuple[str, ...]) -> None:
    assert run_here(*words).code == 2


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are as small whatever the tensor, and what is larger than may be kept is read again: same result."""
    from abliterate.difference import matrix

    base = pico.save(tmp_path / "b", "llama", dtype=torch.bfloat16, vocab_size=900)
    edited = editing.changed(base, tmp_path / "e", editing.projected(pico.unit(seed=1)))
    whole = json.loads(run_here("diff", base, edited, "--json").out)
    seen: list[int] = []
    read = matrix.read_rows

    def counted(*args: object) -> torch.Tensor:
        block = read(*args)  # type: ignore[arg-type]
        seen.append(block.nbytes)
        return block

    monkeypatch.setattr(matrix, "read_rows", counted)
    monkeypatch.setattr(matrix, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(matrix, "KEEP_BYTES", 0)
    small = json.loads(run_here("diff", base, edited, "--json").out)
    assert max(seen) <= 4096 and len(seen) > 100
    for one, other in zip(whole["tensors"]["changed"], small["tensors"]["changed"], strict=True):
        assert one["spectrum"][:1] == pytest.approx(other["spectrum"][:1], rel=1e-5)
        assert one["edge"] == pytest.approx(other["edge"]) and one["rank"] == other["rank"]
