"""Gemma 3: a norm with a learned gain stands behind every writer, and the plain formula is not enough."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.real.support import run

HIDDEN = 640
TEXTS = ("The river rises in the mountains and", "A lathe turns the wood while")


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "r.safetensors"
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))
    save_file({"direction": vector / vector.norm()}, path)
    return path


def stream(folder: Path, direction: Path) -> list[float]:
    """max |h.r|/|h| at the input of every layer and of the final norm, by hooks of the test's own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    r = load_file(direction)["direction"]
    seen: list[float] = []

    def look(_module: Any, args: Any, kwargs: Any) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        seen.append(float(((h @ r).abs() / h.norm(dim=-1)).max()))

    places = [*model.model.layers, model.model.norm]
    handles = [place.register_forward_pre_hook(look, with_kwargs=True) for place in places]
    with torch.inference_mode():
        for text in TEXTS:
            model(**tokenizer(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return [max(seen[i :: len(places)]) for i in range(len(places))]


def test_a_base_model_converts_and_its_stream_is_clean(gemma: Path, direction: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("convert", str(gemma), str(out), "--direction", str(direction), "--no-evaluate", "--json")
    manifest = json.loads(done.stdout)
    assert manifest["certificate"]["holds"]
    assert manifest["certificate"]["stream"]["text"] == "plain"
    layers = stream(out, direction)
    assert len(layers) == 19
    assert max(layers) <= 0.02 / math.sqrt(HIDDEN)


def test_the_plain_formula_fails_here(gemma: Path, direction: Path, tmp_path: Path) -> None:
    r = load_file(direction)["direction"].double()
    tensors = load_file(gemma / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = (tensor.double() - torch.outer(r, r @ tensor.double())).to(tensor.dtype)
        if name.endswith("embed_tokens.weight"):
            tensors[name] = (tensor.double() - (tensor.double() @ r)[:, None] * r).to(tensor.dtype)
    for path in gemma.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert max(stream(tmp_path, direction)) > 10 * 0.02 / math.sqrt(HIDDEN)
    done = run("verify", str(tmp_path), "--direction", str(direction), check=False)
    assert done.returncode == 1
