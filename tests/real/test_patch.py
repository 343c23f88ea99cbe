"""Nothing but the difference, of a real model: a patch of kilobytes, and an adapter."""

import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from abliterate.checkpoint.files import DIRECTION_FILE
from tests.commandline import snapshot
from tests.real.support import Converted, run

REDUCED = {"abliteration.json", DIRECTION_FILE}
"""What a patch that is not whole rebuilds without the candidate grid, and with its hash."""


def test_a_patch_of_kilobytes(subject: Path, converted: Converted, tmp_path: Path) -> None:
    """Every process is another; the weights and all that loads with them come out to the byte."""
    made = json.loads(run("patch", str(subject), str(converted.folder), "-o", str(tmp_path / "a"), "--json").stdout)
    assert made["bytes"] == (tmp_path / "a").stat().st_size < 100_000
    run("apply", str(tmp_path / "a"), str(subject), str(tmp_path / "out"), "-q")
    before, after = snapshot(converted.folder), snapshot(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == REDUCED


def step(values: torch.Tensor) -> torch.Tensor:
    """Of the grid of bf16 at each value."""
    return torch.exp2(values.abs().float().clamp_min(2.0**-126).log2().floor() - 7)


def test_an_adapter(subject: Path, converted: Converted, tmp_path: Path) -> None:
    """Merged by PEFT, all but a few in a million weights are within a bf16 step, at their column's largest, of ours."""
    direction, folder = converted.folder / DIRECTION_FILE, tmp_path / "adapter"
    words = ("--adapter", "peft", "--direction", str(direction), "--no-evaluate", "-q")
    run("convert", str(subject), str(folder), *words)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    base = load_file(subject / "model.safetensors")
    ours = load_file(converted.folder / "model.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        model = AutoModelForCausalLM.from_pretrained(subject, dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    near = count = beyond = 0
    for name in base:
        if torch.equal(base[name], ours[name]):
            assert torch.equal(merged[name], base[name]), name
            continue
        axis = int("embed" in name)
        apart = (merged[name].float() - ours[name].float()).abs()
        most = step(base[name]).amax(axis, keepdim=True)
        assert bool((apart <= 2 * most).all()), name
        beyond += int((apart > most).sum())
        near += int((apart <= torch.maximum(step(merged[name]), step(ours[name]))).sum())
        count += apart.numel()
    assert near > 0.98 * count and beyond < 1e-6 * count
