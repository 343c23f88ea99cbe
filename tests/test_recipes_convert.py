"""Every shipped recipe on a tiny model: what it says is removed is what the stored weights have lost."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from abliterate import convert
from abliterate.recipe import Recipe, load_recipe
from tests import pico
from tests.commandline import run_here

QUICK = """
name: {name}
extends: {name}
calibration: {{train: 16, validation: 4, test: 4}}
direction: {{filter: false, refusal_tokens: [I, S], positions: 2}}
selection: {{max_kl: 1000000.0, min_induce: -1000000.0}}
evaluation: {{max_new_tokens: 2, kl_tokens: 2}}
"""
EXACT = ("refusal", "projected", "norm-preserving", "subspace")
PARTIAL = ("per-layer", "induce")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save(tmp_path_factory.mktemp("recipes") / "base", "llama", tied=True, shards=2, tokenizer=True)


def quick(folder: Path, name: str) -> Recipe:
    path = folder / "quick.yaml"
    path.write_text(QUICK.format(name=name))
    return load_recipe(str(path))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: w for path in sorted(folder.glob("model*.safetensors")) for name, w in load_file(path).items()}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact_is_certified_and_verified(base: Path, tmp_path: Path, name: str) -> None:
    made = convert(str(base), tmp_path / "out", recipe=quick(tmp_path, name))
    assert made.holds and made.certificate.holds and made.manifest["edit"]["strength"] == 1.0
    removes = made.manifest["edit"]["removes"]
    assert removes["directions"] == (3 if name == "subspace" else 1) and removes["strengths"] is None
    assert removes["norms"] == ("kept" if name == "norm-preserving" else "free")
    ran = run_here("verify", tmp_path / "out", "--json")
    assert ran.code == 0 and json.loads(ran.out)["holds"], ran.err


@pytest.mark.parametrize("name", PARTIAL)
def test_what_leaves_something_says_what_and_is_sound(base: Path, tmp_path: Path, name: str) -> None:
    made = convert(str(base), tmp_path / "out", recipe=quick(tmp_path, name))
    assert (
        made.holds
        and made.certificate.sound
        and not made.certificate.holds
        and not made.manifest["certificate"]["exact"]
    )
    writers = made.manifest["edit"]["writers"]
    assert all(
        abs(w["residual_after"] - w["residual_wanted"]) <= w["tolerance"] + 1e-3 * w["residual_wanted"] for w in writers
    )
    assert any(claim.startswith("not exact: ") for claim in made.manifest["warnings"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**The edit is not exact**, on purpose" in card
    ran = run_here("verify", tmp_path / "out", "--json")
    assert ran.code == 1 and not json.loads(ran.out)["holds"]


def test_layers_lose_their_own_directions_and_embeddings_stay(base: Path, tmp_path: Path) -> None:
    made = convert(str(base), tmp_path / "out", recipe=quick(tmp_path, "per-layer"), evaluate=False)
    removes = made.manifest["edit"]["removes"]
    assert removes["per_layer"] and removes["strengths"]["outside"] == 0.0
    before, after = weights(base), weights(tmp_path / "out")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert "model.embed_tokens.weight" not in {writer["tensor"] for writer in made.manifest["edit"]["writers"]}
    found = load_file(tmp_path / "out" / "refusal_direction.safetensors")
    for layer, (basis, strengths) in enumerate(zip(found["edit.layers"], found["edit.strengths"], strict=True)):
        r = found["edit.bases"][basis, 0].double()
        for part, strength in zip(("self_attn.o_proj", "mlp.down_proj"), strengths, strict=True):
            name = f"model.layers.{layer}.{part}.weight"
            was, now = (r @ w[name].double() for w in (before, after))
            assert torch.allclose(now, (1 - strength) * was, atol=1e-2 * float(was.abs().max()))


def test_the_direction_file_of_any_recipe_gives_the_same_weights_again(base: Path, tmp_path: Path) -> None:
    convert(str(base), tmp_path / "one", recipe=quick(tmp_path, "per-layer"), evaluate=False)
    file = tmp_path / "one" / "refusal_direction.safetensors"
    convert(str(base), tmp_path / "two", direction=file, evaluate=False)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_norms_are_kept_and_were_not(base: Path, tmp_path: Path) -> None:
    name, before = "model.layers.1.mlp.down_proj.weight", weights(base)
    lengths = before[name].double().norm(dim=0)
    changes = {}
    for recipe in ("projected", "norm-preserving"):
        convert(str(base), tmp_path / recipe, recipe=quick(tmp_path, recipe), evaluate=False)
        changes[recipe] = float((weights(tmp_path / recipe)[name].double().norm(dim=0) / lengths - 1).abs().max())
    assert changes["norm-preserving"] < 4e-3 < changes["projected"]


def test_a_search_is_explained_and_what_it_found_is_in_the_weights(base: Path, tmp_path: Path) -> None:
    recipe = quick(tmp_path, "search").replacing("search", steps=3, further_steps=1, kl_weights=(0.5, 5.0))
    made = convert(str(base), tmp_path / "out", recipe=recipe)
    assert made.holds and made.certificate.sound and not made.certificate.holds
    found = made.manifest["search"]
    assert found["pick"] in found["front"] and {point["weight"] for point in found["points"]} == {0.5, 5.0}
    strengths = made.manifest["edit"]["removes"]["strengths"]["layers"]
    assert len({value for row in strengths for value in row}) > 2, "strengths are as they were before the search"
    assert (tmp_path / "out" / "search.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Strengths.** Found by gradients" in card and "![Refusals against KL" in card


def test_a_search_that_was_not_asked_for_is_not_in_the_manifest(base: Path, tmp_path: Path) -> None:
    made = convert(str(base), tmp_path / "out", recipe=quick(tmp_path, "per-layer"), evaluate=False)
    assert made.manifest["search"] is None and not (tmp_path / "out" / "search.png").exists()
