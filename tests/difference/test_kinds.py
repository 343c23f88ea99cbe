"""Pico models edited in every way that is told apart, each named rightly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import abliterate
from abliterate.difference.kinds import Kind
from abliterate.differing import Difference, diff
from abliterate.recipe import load_recipe
from tests import pico
from tests.difference import editing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDE = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4}


@pytest.fixture(scope="module", params=DTYPES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return pico.save(folder, "llama", dtype=DTYPES[request.param], tied=False, shards=2, **WIDE)


def unit(seed: int) -> torch.Tensor:
    return pico.unit(WIDE["hidden_size"], seed)


def named(base: Path, edited: Path, kind: Kind, **options: Any) -> Difference:
    found = diff(str(base), str(edited), **options)
    assert found.verdict.kind == kind, found.verdict
    assert found.verdict.title and (found.verdict.evidence or kind == "identical")
    return found


def test_the_same_files_are_identical(base: Path) -> None:
    found = named(base, base, "identical")
    assert found.same and found.files.same and not found.removed


def test_other_shards_and_another_order_are_identical(base: Path, tmp_path: Path) -> None:
    tensors = editing.tensors_of(base)
    found = named(base, editing.written(base, tmp_path / "e", dict(reversed(tensors.items()))), "identical")
    assert found.same and len(found.tensors) == len(tensors)


def test_a_projection_of_any_tool(base: Path, tmp_path: Path) -> None:
    edited = editing.changed(base, tmp_path / "e", editing.projected(unit(1)))
    file = pico.direction_file(tmp_path / "r.safetensors", WIDE["hidden_size"], 1)
    found = named(base, edited, "projection", direction=file)
    assert found.shared is not None and found.shared.one and found.shared.dimensions == 1
    assert abs(float(found.shared.direction @ unit(1))) > 0.9999
    assert found.likeness is not None and found.likeness.shared is not None and found.likeness.least is not None
    assert found.likeness.shared > 0.9999 and found.likeness.least > 0.999
    assert found.verdict.strength == pytest.approx(1, abs=0.01)
    changed = [tensor for tensor in found.tensors if tensor.differs]
    assert len(changed) == 9 and {tensor.rank for tensor in changed} == {1}
    matrices = [writer for writer in found.removed if writer.tensor.endswith("weight")]
    assert max(w.after for w in matrices) < 0.02 < min(w.before for w in matrices)


def test_a_projection_along_another_direction_is_not_like_the_given_one(base: Path, tmp_path: Path) -> None:
    edited = editing.changed(base, tmp_path / "e", editing.projected(unit(1)))
    file = pico.direction_file(tmp_path / "r.safetensors", WIDE["hidden_size"], 2)
    found = named(base, edited, "projection", direction=file)
    assert found.likeness is not None and found.likeness.shared is not None
    assert found.likeness.shared == pytest.approx(abs(float(unit(1) @ unit(2))), abs=1e-3)
    assert max(w.after for w in found.likeness.removed if w.changed) > 0.05


@pytest.mark.parametrize("strength", [0.4, 1.5, -1.0])
def test_a_strength_other_than_1_is_measured(base: Path, tmp_path: Path, strength: float) -> None:
    edited = editing.changed(base, tmp_path / "e", editing.projected(unit(1), strength))
    assert named(base, edited, "steering").verdict.strength == pytest.approx(strength, abs=0.02)


def test_several_directions(base: Path, tmp_path: Path) -> None:
    basis = torch.linalg.qr(torch.stack([unit(seed) for seed in range(3)], 1))[0]

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        for r in basis.T:
            weight = editing.projected(r)(name, weight)
        return weight

    found = named(base, editing.changed(base, tmp_path / "e", change), "projection")
    assert found.shared is not None and found.shared.dimensions == 3 and "3 directions" in found.verdict.title
    assert float((found.shared.basis @ basis).square().sum()) == pytest.approx(3, abs=1e-3)
    assert max(writer.after for writer in found.removed if writer.changed) < 0.02


def test_kept_norms(base: Path, tmp_path: Path) -> None:
    found = named(base, editing.changed(base, tmp_path / "e", editing.norm_kept(unit(1))), "norm-preserving")
    assert found.shared is not None and abs(float(found.shared.direction @ unit(1))) > 0.99
    assert all(writer.after < 0.2 * writer.before for writer in found.removed if writer.changed)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_heretics_loras(base: Path, tmp_path: Path, own: bool, rows: bool) -> None:
    change = editing.heretic(
        lambda layer: unit(10 + layer) if own else unit(1),
        lambda layer, name: 0.5 + 0.2 * layer + 0.1 * ("o_proj" in name),
        rows,
    )
    uneven = editing.changed(base, tmp_path / "b", _uneven)
    found = named(uneven, editing.changed(uneven, tmp_path / "e", change), "layered-projection")
    assert "LoRA" in found.verdict.title and ("recipe" in found.verdict.title) is not rows
    strengths = {t.name: t.fit.strength for t in found.tensors if t.fit}
    wanted = {name: 0.5 + 0.2 * int(name.split(".")[2]) + 0.1 * ("o_proj" in name) for name in strengths}
    assert strengths == pytest.approx(wanted, abs=0.1)
    assert found.shared is not None and found.shared.one is not own
    if rows and not own:
        assert found.shared.form == "rows" and abs(float(found.shared.direction @ unit(1))) > 0.99


def _uneven(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Rows of writers of lengths far apart, as real models have some."""
    made = torch.Generator().manual_seed(sum(name.encode()))
    sizes = torch.logspace(-0.7, 0.7, len(weight))[torch.randperm(len(weight), generator=made)]
    return weight * sizes[:, None] if name.endswith(editing.WRITERS) else weight


@pytest.mark.parametrize("rank", [1, 4])
def test_a_learned_lora(base: Path, tmp_path: Path, rank: int) -> None:
    found = named(base, editing.changed(base, tmp_path / "e", editing.lora(rank)), "lora")
    assert f"rank {rank} in" in found.verdict.title and "q_proj (layers 0–3)" in found.verdict.title
    changed = [tensor for tensor in found.tensors if tensor.differs]
    assert {(tensor.rank, tensor.state) for tensor in changed} == {(rank, "low-rank")}
    assert all(tensor.fit is not None and abs(tensor.fit.cosine) < 0.5 for tensor in changed)


def test_a_fine_tune(base: Path, tmp_path: Path) -> None:
    found = named(base, editing.changed(base, tmp_path / "e", editing.tuned()), "fine-tune")
    assert not any(tensor.state == "same" for tensor in found.tensors)


LIGHT = {torch.bfloat16: 2e-4, torch.float16: 2e-5}
"""Steps beside the size of weights: about a twentieth of those of the dtype."""


@pytest.mark.parametrize("dtype", LIGHT, ids=str)
def test_a_fine_tune_below_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    base = pico.save(tmp_path / "b", "llama", dtype=dtype, tied=False, **WIDE)
    found = named(base, editing.changed(base, tmp_path / "e", editing.tuned(LIGHT[dtype])), "fine-tune")
    assert "very small steps" in found.verdict.title
    assert {tensor.state for tensor in found.tensors if tensor.differs} <= {"rounding", "vector"}


def test_a_fine_tune_below_rounding_in_most(tmp_path: Path) -> None:
    base = pico.save(tmp_path / "b", "llama", dtype=torch.bfloat16, tied=False, **WIDE)
    strong, light = editing.tuned(), editing.tuned(LIGHT[torch.bfloat16])

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        return (strong if "layers.1." in name else light)(name, weight)

    found = named(base, editing.changed(base, tmp_path / "e", change), "fine-tune")
    assert "layers 1)" in found.verdict.title and "small weights alone" in " ".join(found.verdict.evidence)


@pytest.mark.parametrize("dtype", LIGHT, ids=str)
def test_weights_that_were_stored_anew(tmp_path: Path, dtype: torch.dtype) -> None:
    base = pico.save(tmp_path / "b", "llama", dtype=dtype, tied=False, **WIDE)
    edited = editing.changed(base, tmp_path / "e", lambda _, weight: (weight * 1.1).to(dtype).float() / 1.1)
    found = named(base, edited, "rounding")
    assert {tensor.far for tensor in found.tensors if tensor.state == "rounding"} == {0.0}


def test_another_model(base: Path, tmp_path: Path) -> None:
    other = pico.save(tmp_path / "o", "llama", tied=False, seed=7, **WIDE)
    found = named(base, other, "different-model")
    assert "not related" in found.verdict.title


def test_a_model_of_other_shapes(base: Path, tmp_path: Path) -> None:
    other = pico.save(tmp_path / "o", "llama", tied=False, **(WIDE | {"hidden_size": 64}))
    found = named(base, other, "different-model")
    assert found.pairing.reshaped and any(key.key == "hidden_size" for key in found.files.config)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(base: Path, tmp_path: Path, bits: int) -> None:
    found = named(base, editing.changed(base, tmp_path / "e", editing.quantised(bits)), "quantised")
    assert f"about {bits} bits" in found.verdict.title


def test_another_vocabulary(base: Path, tmp_path: Path) -> None:
    tensors = editing.tensors_of(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:5] * 0.5])
    edited = editing.configured(editing.written(base, tmp_path / "e", tensors), vocab_size=pico.VOCABULARY + 5)
    found = named(base, edited, "vocabulary")
    assert any(f"{pico.VOCABULARY + 5} rows" in said for said in found.verdict.evidence)


def test_a_retrained_embedding(base: Path, tmp_path: Path) -> None:
    tensors = editing.tensors_of(base)
    tensors["model.embed_tokens.weight"][3] *= 2
    found = named(base, editing.written(base, tmp_path / "e", tensors), "vocabulary")
    assert any("1 of 131 rows" in said for said in found.verdict.evidence)


def test_missing_and_extra_tensors(base: Path, tmp_path: Path) -> None:
    tensors = editing.tensors_of(base)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.extra.weight"] = torch.ones(3, 3)
    found = named(base, editing.written(base, tmp_path / "e", tensors), "unknown")
    assert found.pairing.missing == ("model.layers.1.mlp.up_proj.weight",)
    assert found.pairing.extra == ("model.extra.weight",)
    assert "missing" in " ".join(found.verdict.evidence)


def test_biases_that_steer(base: Path, tmp_path: Path) -> None:
    tensors = editing.tensors_of(base)
    for layer in range(4):
        tensors[f"model.layers.{layer}.mlp.down_proj.bias"] = unit(1).clone()
    named(base, editing.written(base, tmp_path / "e", tensors), "vectors")


def test_values_that_are_not_finite(base: Path, tmp_path: Path) -> None:
    tensors = editing.tensors_of(base)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    found = named(base, editing.written(base, tmp_path / "e", tensors), "unknown")
    assert [tensor.name for tensor in found.tensors if tensor.state == "incomparable"] == [
        "model.layers.0.mlp.down_proj.weight"
    ]


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp32"), ("bf16", "fp16")])
def test_another_dtype(tmp_path: Path, before: str, after: str) -> None:
    base = pico.save(tmp_path / "b", "llama", dtype=DTYPES[before])
    edited = editing.changed(base, tmp_path / "e", lambda _, weight: weight, DTYPES[after])
    found = named(base, edited, "dtype")
    rounded = any(tensor.state == "cast" for tensor in found.tensors)
    assert rounded == ("rounded to" in found.verdict.title)
    assert rounded == (not all(torch.equal(a.double(), b.double()) for a, b in _both(base, edited)))
    named(edited, base, "dtype")


def _both(base: Path, edited: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    first, second = (editing.tensors_of(folder) for folder in (base, edited))
    return [(first[name], second[name]) for name in first]


def test_a_round_trip_through_a_coarser_dtype(tmp_path: Path) -> None:
    base = pico.save(tmp_path / "b", "llama")
    edited = editing.changed(base, tmp_path / "e", lambda _, weight: weight.half().float())
    assert "rounded to F16" in named(base, edited, "dtype").verdict.title


def test_an_edit_of_weights_that_were_rounded_too(tmp_path: Path) -> None:
    """The base in fp32, the edited in bf16: the rounding of all tensors is no rank."""
    base = pico.save(tmp_path / "b", "llama", **WIDE)
    edited = editing.changed(base, tmp_path / "e", editing.projected(unit(1)), torch.bfloat16)
    found = named(base, edited, "projection")
    assert {tensor.rank for tensor in found.tensors if tensor.differs} == {1}


def test_an_edit_in_bf16_that_was_stored_in_fp32(tmp_path: Path) -> None:
    """The grid of the values counts, not the dtype of the file."""
    base = pico.save(tmp_path / "b", "llama", **WIDE)
    rounded = editing.changed(base, tmp_path / "r", lambda _, weight: weight.bfloat16().float())
    edit = editing.projected(unit(1))
    edited = editing.changed(rounded, tmp_path / "e", lambda name, weight: edit(name, weight).bfloat16().float())
    found = named(rounded, edited, "projection")
    assert {tensor.rank for tensor in found.tensors if tensor.differs} == {1}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_this_program_makes(tmp_path: Path, family: str, tied: bool) -> None:
    base = pico.save(tmp_path / "b", family, dtype=torch.bfloat16, tied=tied)
    file = pico.direction_file(tmp_path / "r.safetensors", pico.HIDDEN, 1)
    out = abliterate.convert(str(base), tmp_path / "out", direction=file, evaluate=False).folder
    found = named(base, out, "projection")
    assert found.pairing.head == ("untied" if tied else None)
    assert found.likeness is not None and found.likeness.least is not None and found.likeness.shared is not None
    assert found.likeness.least > 0.98 and found.likeness.shared > 0.999
    assert all(writer.after < 1e-3 for writer in found.likeness.removed)
    assert found.claims is not None and found.claims["recipe"] == "refusal"


def test_gains_behind_writers_are_seen_through(tmp_path: Path) -> None:
    """What this program takes out there differs from tensor to tensor, and is one direction in the stream."""
    base = pico.save(tmp_path / "b", "gemma2", dtype=torch.bfloat16)
    file = pico.direction_file(tmp_path / "r.safetensors", pico.HIDDEN, 1)
    out = abliterate.convert(str(base), tmp_path / "out", direction=file, evaluate=False).folder
    found = named(base, out, "projection")
    assert found.shared is not None and found.shared.form == "gain"
    assert {tensor.fit.form for tensor in found.tensors if tensor.fit} == {"gain", "plain"}
    other = editing.changed(base, tmp_path / "plain", editing.projected(pico.unit(seed=1)))
    plain = named(base, other, "projection")
    assert plain.shared is not None and plain.shared.form == "plain"
    assert plain.shared.cosines[0] > 0.999
    given = diff(str(base), str(other), direction=file).likeness
    assert given is not None and given.least is not None and given.least < 0.99


RECIPES: dict[str, Callable[[], Any]] = {
    "norm-preserving": lambda: load_recipe("refusal").replacing("edit", norms="kept"),
    "steering": lambda: load_recipe("refusal").replacing("edit", strength=0.5),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes_of_this_program(tmp_path: Path, kind: Any) -> None:
    base = pico.save(tmp_path / "b", "llama", dtype=torch.bfloat16, tied=False)
    file = pico.direction_file(tmp_path / "r.safetensors", pico.HIDDEN, 1)
    out = abliterate.convert(str(base), tmp_path / "o", recipe=RECIPES[kind](), direction=file, evaluate=False).folder
    found = named(base, out, kind)
    assert found.likeness is not None and found.likeness.shared is not None and found.likeness.shared > 0.99


def test_names_with_another_prefix_meet(base: Path, tmp_path: Path) -> None:
    tensors = {f"language_model.{name}": tensor for name, tensor in editing.tensors_of(base).items()}
    found = named(base, editing.written(base, tmp_path / "e", tensors), "identical")
    assert found.pairing.renamed == ("", "language_model.")


def test_an_architecture_that_is_not_known(base: Path, tmp_path: Path) -> None:
    """Shapes and names have to do, and that is said."""
    strange = editing.configured(editing.written(base, tmp_path / "b", editing.tensors_of(base)), model_type="strange")
    edited = editing.changed(strange, tmp_path / "e", editing.projected(unit(1)))
    found = named(strange, edited, "projection")
    assert not found.by_plan and found.why_not is not None and found.hidden_size == WIDE["hidden_size"]
    assert found.shared is not None and abs(float(found.shared.direction @ unit(1))) > 0.9999


def test_the_recovered_direction_is_saved_and_good_for_a_conversion(base: Path, tmp_path: Path) -> None:
    edited = editing.changed(base, tmp_path / "e", editing.projected(unit(1)))
    diff(str(base), str(edited), save_direction=tmp_path / "found.safetensors")
    saved = load_file(tmp_path / "found.safetensors")["direction"]
    assert abs(float(saved @ unit(1))) > 0.9999
    done = abliterate.convert(str(base), tmp_path / "o", direction=tmp_path / "found.safetensors", evaluate=False)
    assert done.holds


def test_steps_as_small_as_the_grid_have_one_rank(tmp_path: Path) -> None:
    """In a wide matrix rounding follows the step, and comes out as singular values above the edge."""
    made = torch.Generator().manual_seed(0)
    weight = (torch.randn(1500, 1600, generator=made) * 0.02).bfloat16()
    r = pico.unit(1500, 1)
    edited = (weight.float() - torch.outer(r, r @ weight.float())).bfloat16()
    folders = []
    for name, tensor in (("b", weight), ("e", edited)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"hidden_size": 1500}')
        save_file({"layers.0.o_proj.weight": tensor}, tmp_path / name / "model.safetensors")
        folders.append(str(tmp_path / name))
    (found,) = diff(*folders).tensors
    assert found.spectrum[1] > 1.1 * found.edge, "this case has to be one that the edge alone gets wrong"
    assert (found.rank, found.state) == (1, "low-rank")
