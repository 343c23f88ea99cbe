"""`abliterate inspect`: claims that the files bear out, and every way in which they can fail to."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import abliterate
from abliterate.inspecting import inspect
from abliterate.recipe import load_recipe
from tests import pico
from tests.commandline import run, run_here
from tests.hub_server import serving

WRITER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save(tmp_path_factory.mktemp("inspect") / "base", "llama", dtype=torch.bfloat16, tied=True)


@pytest.fixture(scope="module")
def converted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("inspect")
    file = pico.direction_file(room / "r.safetensors")
    return abliterate.convert(str(base), room / "out", direction=file, evaluate=False).folder


def verdicts(folder: Path, **options: Any) -> dict[str, bool | None]:
    return {check.claim: check.holds for check in inspect(str(folder), **options).checks}


def test_what_was_just_written_is_borne_out(base: Path, converted: Path) -> None:
    found = verdicts(converted, base=str(base))
    assert found and all(found.values()), found
    assert {"shards", "hashes", "direction", "config", "writers", "removed", "residuals", "base"} <= set(found)
    ran = run_here("inspect", converted, "--base", base)
    assert (ran.code, ran.err) == (0, "")
    for text in ("recipe refusal on base", "holds", "bear the claims out", "not measured"):
        assert text in ran.out
    assert all(len(line) <= 80 for line in ran.out.splitlines())


def test_json(converted: Path) -> None:
    found = json.loads(run_here("inspect", converted, "--json").out)
    assert found["holds"] is True and found["claims"]["recipe"] == "refusal"
    assert {check["holds"] for check in found["checks"]} == {True}
    assert found["facts"]["model_type"] == "llama" and found["facts"]["direction"] is True


def test_a_checkpoint_without_a_manifest_claims_nothing(base: Path) -> None:
    ran = run_here("inspect", base)
    assert (
        ran.code == 0
        and "claims" in ran.out
        and "none" in ran.out
        and "13 residual writers" in " ".join(ran.out.split())
    )
    found = json.loads(run_here("inspect", base, "--json").out)
    assert found["claims"] is None and found["holds"] is None and found["checks"] == []


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _put_back(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[WRITER] += torch.outer(pico.unit(), torch.ones(tensors[WRITER].shape[1])).bfloat16()

    _weights(folder, change)


def _one_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _another_direction(folder: Path) -> None:
    pico.direction_file(folder / "refusal_direction.safetensors", seed=5)


def _config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))


def _manifest(**changes: Callable[[Any], Any]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "abliteration.json"
        content = json.loads(path.read_text())
        for key, change in changes.items():
            change(content[key])
        path.write_text(json.dumps(content))

    return harm


FALSE: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "the direction is back": (_put_back, {"hashes", "removed", "residuals"}),
    "one bit": (_one_bit, {"hashes"}),
    "another direction": (_another_direction, {"direction", "removed", "residuals"}),
    "config": (_config, {"config", "writers", "removed"}),
    "a residual": (_manifest(edit=lambda edit: edit["writers"][3].update(residual_after=0.01)), {"residuals"}),
    "a writer is left out": (_manifest(edit=lambda edit: edit["writers"].pop(2)), {"writers"}),
    "a writer that is none": (
        _manifest(edit=lambda edit: edit["writers"][2].update(tensor="model.norm.weight")),
        {"writers", "residuals"},
    ),
    "a size": (_manifest(output=lambda output: output["shards"][0].update(bytes=5)), {"shards"}),
    "a type": (_manifest(base=lambda base: base.update(model_type="qwen3")), {"architecture"}),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_claim_is_told(converted: Path, tmp_path: Path, name: str) -> None:
    harm, wanted = FALSE[name]
    folder = shutil.copytree(converted, tmp_path / "out")
    harm(folder)
    assert {claim for claim, holds in verdicts(folder).items() if holds is False} == wanted
    ran = run_here("inspect", folder)
    assert ran.code == 1 and "does not hold" in ran.out
    assert ran.err.startswith("error: out does not bear out") and ran.err.count("\n") == 1


def test_another_base_is_told(converted: Path, tmp_path: Path) -> None:
    other = pico.save(tmp_path / "base", "llama", dtype=torch.bfloat16, tied=True, seed=3)
    assert verdicts(converted, base=str(other))["base"] is False
    longer = pico.save(tmp_path / "longer", "llama", dtype=torch.bfloat16, tied=True, num_hidden_layers=2)
    assert verdicts(converted, base=str(longer))["base"] is False


def test_without_hashes_they_are_not_said_to_hold(base: Path, tmp_path: Path) -> None:
    file = pico.direction_file(tmp_path / "r.safetensors")
    assert run_here("convert", base, tmp_path / "o", "--direction", file, "--no-evaluate", "--no-hash", "-q").code == 0
    found = verdicts(tmp_path / "o")
    assert found["hashes"] is None and found["direction"] is True and found["removed"] is True
    assert "not checked" in run_here("inspect", tmp_path / "o").out


def test_a_strength_needs_the_base(base: Path, tmp_path: Path) -> None:
    file = pico.direction_file(tmp_path / "r.safetensors")
    recipe = load_recipe("refusal").replacing("edit", strength=0.5)
    out = abliterate.convert(str(base), tmp_path / "o", recipe=recipe, direction=file, evaluate=False).folder
    assert verdicts(out)["removed"] is None
    assert verdicts(out, base=str(base))["removed"] is None or verdicts(out, base=str(base))["removed"] is True
    assert inspect(str(out)).holds


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"schema": "abliteration/1"}', b"\xff" * 50])
def test_a_damaged_manifest_ends_in_one_line(converted: Path, tmp_path: Path, content: bytes) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    (folder / "abliteration.json").write_bytes(content)
    ran = run_here("inspect", folder)
    assert ran.code == 1 and ran.err.startswith("error: ") and ran.err.count("\n") == 1


@pytest.mark.parametrize("key", ["edit", "output", "base", "direction", "certificate"])
def test_a_manifest_of_other_types_ends_in_one_line(converted: Path, tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    path = folder / "abliteration.json"
    for value in (None, [], "x", {}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        ran = run_here("inspect", folder)
        assert ran.code == 1 and ran.err.startswith("error: ") and ran.err.count("\n") == 1, (value, ran)


def test_a_hub_model_without_a_manifest_costs_its_headers(tmp_path: Path) -> None:
    pico.save(tmp_path / "repository", "llama", vocab_size=50_000)
    with serving("org/pico", tmp_path / "repository") as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "abliterate", "inspect", "org/pico", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["name"] == "org/pico" and found["claims"] is None
    sent = sum(size for name, size in hub.sent.items() if name.endswith(".safetensors"))
    assert 0 < sent < 3 << 20


def test_in_pipes(converted: Path) -> None:
    ran = run("inspect", converted, "--json")
    assert (ran.code, ran.err) == (0, "") and json.loads(ran.out)["holds"]
