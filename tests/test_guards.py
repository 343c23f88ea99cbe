"""What a conversion says and does where something is missing, damaged, or too large."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import abliterate
from abliterate import proving
from abliterate.architecture.rules import Rule
from abliterate.architecture.table import Table, load_table
from abliterate.dryrun import dry_run
from abliterate.errors import AbliterateError, CalibrationError, OutputError
from tests import pico
from tests.resident import llama, random_prompts, resident

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def direction(tmp_path: Path) -> Path:
    return pico.direction_file(tmp_path / "r.safetensors", pico.HIDDEN, 1)


def test_a_single_shard_gets_an_index_of_its_own_tensors(tmp_path: Path, direction: Path) -> None:
    base = pico.save(tmp_path / "base", "llama")
    out = abliterate.convert(str(base), tmp_path / "out", direction=direction, evaluate=False).folder
    placed = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert placed == dict.fromkeys(load_file(out / "model.safetensors"), "model.safetensors")
    assert "direction" not in placed and abliterate.verify(str(out)).holds


def test_a_stored_copy_of_the_tied_head_is_certified_too(tmp_path: Path, direction: Path) -> None:
    base = pico.save(tmp_path / "base", "qwen3", tied=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    recipe = abliterate.Recipe().replacing("edit", head="tied")
    done = abliterate.convert(str(base), tmp_path / "out", recipe=recipe, direction=direction, evaluate=False)
    kinds = {writer["tensor"]: writer["kind"] for writer in done.manifest["edit"]["writers"]}
    assert done.holds and kinds["lm_head.weight"] == "head copy"


def test_a_damaged_tokenizer_is_not_a_missing_one(tmp_path: Path, direction: Path) -> None:
    base = pico.save(tmp_path / "base", "llama", tokenizer=True)
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(AbliterateError, match="no usable tokenizer"):
        abliterate.convert(str(base), tmp_path / "out", direction=direction, evaluate=False)
    assert not (tmp_path / "out").exists()


def test_no_tokenizer_at_all_is_said(tmp_path: Path, direction: Path) -> None:
    base = pico.save(tmp_path / "base", "llama")
    done = abliterate.convert(str(base), tmp_path / "out", direction=direction)
    assert any("no tokenizer" in warning for warning in done.manifest["warnings"])


def test_a_prompt_beyond_the_positions_is_refused() -> None:
    model = resident(llama(layers=1))
    model.model.config.max_position_embeddings = 4
    with pytest.raises(CalibrationError, match="the model 4 positions"):
        list(model.forward([*random_prompts(2), [7] * 5]))


def test_the_certificate_falls_back_to_the_cpu(
    tmp_path: Path, direction: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, load, tried = pico.save(tmp_path / "base", "llama"), proving.load_model, list[str]()

    def cramped(subject: Any, options: Any, **more: Any) -> Any:
        tried.append(options.device)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("no room")
        return load(subject, options, **more)

    monkeypatch.setattr(proving, "load_model", cramped)
    assert abliterate.convert(str(base), tmp_path / "out", direction=direction, evaluate=False).holds
    assert tried == ["auto", "cpu"] and "measured on the CPU" in caplog.text


def test_a_dry_run_looks_at_the_disk(tmp_path: Path, direction: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pico.save(tmp_path / "base", "llama")
    assert "would be edited" in dry_run(str(base), tmp_path / "a" / "out", direction=direction).summary
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9, 8, 1))
    with pytest.raises(OutputError, match="disk full"):
        dry_run(str(base), tmp_path / "a" / "out", direction=direction)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("the wrong axis of a square matrix", "the direction is back"),
        ("a writer taken for a reader", "the direction is back"),
        ("a gain left out", "the direction is back"),
    ],
)
def test_a_mistake_in_the_table_does_not_pass(
    mistake: str, said: str, tmp_path: Path, direction: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the table says wrongly shows in the stream: nothing is claimed, and the command fails."""
    family, entry = {
        "the wrong axis of a square matrix": ("gpt2", {"attn.c_proj": "attention"}),
        "a writer taken for a reader": ("llama", {"mlp.down_proj": None}),
        "a gain left out": ("gemma2", {"mlp.down_proj": "mlp"}),
    }[mistake]
    real = load_table().find(family, {})
    assert real is not None
    exact = dict(real.layer.exact)
    for module, kind in entry.items():
        rule = exact[f"{module}.weight"]
        wrong = replace(rule, axes=(0,), gain=()) if kind else Rule("reader", "reads", module)
        exact[f"{module}.weight"] = wrong
    broken = Table([replace(real, layer=replace(real.layer, exact=exact))])
    monkeypatch.setattr("abliterate.architecture.entry.load_table", lambda: broken)
    model = pico.save(tmp_path / "m", family)
    made = abliterate.convert(str(model), tmp_path / "out", direction=direction, evaluate=False)
    assert not made.holds and said in made.certificate.failure
    assert made.folder.name == "out.failed" and not (tmp_path / "out").exists()
