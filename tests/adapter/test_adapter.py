"""An adapter does in PEFT what the conversion does to the weights, or is not made."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from abliterate import conversion
from abliterate.adapting import adapt
from abliterate.errors import AdapterError
from abliterate.recipe import Recipe, load_recipe
from abliterate.subject import RunOptions, open_subject
from tests import pico
from tests.commandline import names, run_here

WHOLE = ("llama", "mistral", "qwen2", "phi3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "olmo2", "mixtral",
         "minimax", "deepseek_v3", "qwen3_next", "zamba")  # fmt: skip
PLAIN = ("mistral", "qwen2", "phi3", "olmo2", "zamba")
"""Without biases among the writers and without experts."""
INPUTS = torch.randint(6, 100, (2, 12), generator=torch.Generator().manual_seed(1))


def _recipe(room: Path, edit: str) -> Recipe:
    (room / "mine.yaml").write_text(f"name: mine\nextends: refusal\nedit: {{{edit}}}\n")
    return load_recipe(str(room / "mine.yaml"))


def _both(room: Path, edit: str = "", direction: Path | None = None, inexact: bool = False) -> None:
    """`room/out`, the conversion, and `room/adapter`."""
    given: dict[str, Any] = {
        "recipe": _recipe(room, edit),
        "direction": direction or pico.direction_file(room / "r.safetensors"),
        "options": RunOptions(inexact=inexact),
    }
    conversion.convert(str(room / "base"), room / "out", evaluate=False, **given)
    adapt(str(room / "base"), room / "adapter", **given)


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def _adapted(room: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*unexpected.*")
        return PeftModel.from_pretrained(_load(room / "base", dtype), room / "adapter").eval()


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(INPUTS).logits
    return found


def _assert_same(room: Path, tied_head_apart: bool = True) -> None:
    """Beside the base, and merged, in fp32."""
    ours, adapted = _load(room / "out"), _adapted(room)
    if tied_head_apart:
        wanted_logits = _logits(ours)
        bound = 1e-5 * float(wanted_logits.abs().max())
        torch.testing.assert_close(_logits(adapted), wanted_logits, rtol=0, atol=bound)
    before = dict(_load(room / "base").named_parameters())
    merged, wanted = dict(adapted.merge_and_unload().named_parameters()), dict(ours.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], wanted[name])}
    assert changed
    for name, parameter in merged.items():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=1e-6, msg=lambda text, name=name: name + text)
        assert (name in changed) == (not torch.equal(parameter, before[name])), name


@pytest.mark.parametrize("family", WHOLE)
def test_it_is_the_conversion(family: str, tmp_path: Path) -> None:
    pico.save(tmp_path / "base", family)
    _both(tmp_path)
    _assert_same(tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    manifest = json.loads((tmp_path / "adapter" / "abliteration.json").read_text())
    assert config["r"] == config["lora_alpha"] == 1 and manifest["edit"]["plain"] == (family in PLAIN)
    edited = {each["tensor"] for each in manifest["edit"]["tensors"]} | {
        each["tensor"] for each in manifest["edit"]["left_out"]
    }
    assert edited == {writer.tensor for writer in open_subject(str(tmp_path / "base")).plan.edited}
    assert all(each["after"] < 1e-7 for each in manifest["edit"]["tensors"] if each["kind"] != "bias")
    assert all(each["before"] > 1e-3 for each in manifest["edit"]["tensors"] if each["kind"] != "bias")


@pytest.mark.parametrize(
    ("family", "edit", "rank"),
    [
        ("llama", "strength: 0.6", 1),
        ("llama", "strength: -0.5", 1),
        ("mistral", "embeddings: kept, attention: {peak: 1.2, floor: 0.0, reach: 0.5, at: 0.0}", 1),
        ("gemma3_text", "strength: 0.8, mlp: {peak: 0.3}", 1),
        ("mixtral", "mlp: {peak: 0.3, floor: 0.9}", 1),
    ],
)
def test_strengths(family: str, edit: str, rank: int, tmp_path: Path) -> None:
    pico.save(tmp_path / "base", family)
    _both(tmp_path, edit)
    _assert_same(tmp_path)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "mixtral", "gpt2"])
def test_several_directions_of_each_layers_own(family: str, tmp_path: Path) -> None:
    from abliterate.direction.files import direction_bytes
    from abliterate.edit.cut import Cut

    pico.save(tmp_path / "base", family)
    layers = open_subject(str(tmp_path / "base")).plan.num_layers
    drawn = torch.linalg.qr(torch.randn(2, pico.HIDDEN, 3, generator=torch.Generator().manual_seed(5)))[0].mT
    strengths = torch.linspace(0.2, 1.2, 2 * layers).reshape(layers, 2).double()
    cut = Cut(drawn.contiguous(), tuple(i % 2 for i in range(layers)), strengths, 1.0)
    file = tmp_path / "cut.safetensors"
    file.write_bytes(direction_bytes(drawn[0, 0], cut=cut))
    _both(tmp_path, direction=file)
    _assert_same(tmp_path)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_tied_head(family: str, head: str, tmp_path: Path) -> None:
    """Beside the base it is the untied conversion; merged, the tied one."""
    pico.save(tmp_path / "base", family, tied=True)
    _both(tmp_path, f"head: {head}")
    _assert_same(tmp_path, tied_head_apart=head == "untied")
    if head == "tied":
        merged = _adapted(tmp_path).merge_and_unload()
        torch.testing.assert_close(_logits(merged), _logits(_load(tmp_path / "out")), rtol=0, atol=2e-5)
    assert "Merged, both change" in (tmp_path / "adapter" / "README.md").read_text()


def step(values: Tensor) -> Tensor:
    """Of the grid of bf16 at each value."""
    return torch.exp2(values.abs().float().clamp_min(2.0**-126).log2().floor() - 7)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2", "mixtral"])
def test_merged_into_bf16(family: str, tmp_path: Path) -> None:
    """Apart by what the conversion's rounding pays along the direction: steps of the grid at the column's largest.

    Two at most, and one for nearly all, though all rows of so narrow a model pay; nine of ten also by their own steps.
    """
    pico.save(tmp_path / "base", family, dtype=torch.bfloat16)
    _both(tmp_path)
    merged = dict(_adapted(tmp_path, torch.bfloat16).merge_and_unload().named_parameters())
    ours, base = (dict(_load(tmp_path / name, torch.bfloat16).named_parameters()) for name in ("out", "base"))
    plan = open_subject(str(tmp_path / "base")).plan
    axes = {plan.runtime.writers[writer.tensor]: writer.axis for writer in plan.writers if writer.kind != "bias"}
    further = count = 0
    for name, axis in axes.items():
        axis = axis + (base[name].dim() == 3 and axis == 0)
        apart = (merged[name].float() - ours[name].float()).abs()
        largest = torch.maximum(step(base[name]), step(ours[name])).amax(axis, keepdim=True)
        assert bool((apart <= 2 * largest).all()), name
        further += int((apart > largest).sum())
        count += apart.numel()
        assert float((apart <= torch.maximum(step(merged[name]), step(ours[name]))).float().mean()) > 0.9, name
        assert not torch.equal(merged[name], base[name])
    assert further < 2e-4 * count


@pytest.mark.parametrize(
    ("family", "lacking"),
    [("opt", "model.decoder.embed_positions.weight"), ("bloom", "transformer.word_embeddings_layernorm.bias")],
)
def test_what_it_cannot_hold(family: str, lacking: str, tmp_path: Path) -> None:
    """Refused with the tensor's name; or made without it where that is asked for, and everything says so."""
    pico.save(tmp_path / "base", family)
    direction = pico.direction_file(tmp_path / "r.safetensors")
    with pytest.raises(AdapterError, match=re.escape(lacking)):
        adapt(str(tmp_path / "base"), tmp_path / "adapter", direction=direction)
    assert names(tmp_path) == ["base", "r.safetensors"]
    ran = run_here(
        "convert", tmp_path / "base", tmp_path / "adapter", "--adapter", "peft", "--direction", direction, "--inexact"
    )
    assert ran.code == 0 and f"{lacking} is not in the adapter" in " ".join(ran.out.split())
    assert lacking.replace("_", r"\_") in (tmp_path / "adapter" / "README.md").read_text()
    merged, base = dict(_adapted(tmp_path).merge_and_unload().named_parameters()), _load(tmp_path / "base")
    before = dict(base.named_parameters())
    assert sum(not torch.equal(merged[name], before[name]) for name in before) > 3
    assert any(torch.equal(merged[name], before[name]) for name in before if name == lacking)


@pytest.mark.parametrize("edit", ["norms: kept", "norms: kept, strength: 0.5"])
def test_norms_that_are_kept_have_no_adapter(edit: str, tmp_path: Path) -> None:
    """That is told before anything is calibrated."""
    pico.save(tmp_path / "base", "llama", tokenizer=True)
    with pytest.raises(AdapterError, match=r"full rank.*--patch"):
        adapt(str(tmp_path / "base"), tmp_path / "adapter", recipe=_recipe(tmp_path, edit))
    assert names(tmp_path) == ["base", "mine.yaml"]


def test_the_folder(tmp_path: Path) -> None:
    """Two files for PEFT, and what a reader needs; of a base that is not on the Hub none is named that is."""
    pico.save(tmp_path / "base", "llama", tied=True)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nbase_model: org/first\n---\n# Base\n")
    _both(tmp_path)
    folder = tmp_path / "adapter"
    assert names(folder) == [
        "README.md", "abliteration.json", "adapter_config.json", "adapter_model.safetensors",
        "refusal_direction.safetensors",
    ]  # fmt: skip
    card = ModelCard((folder / "README.md").read_text()).data
    assert (card.library_name, card.license, card.base_model) == ("peft", "mit", None)
    assert str(tmp_path) not in (folder / "README.md").read_text() + (folder / "abliteration.json").read_text()
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values() if tensor.dim() == 2)
    assert {name for name in tensors if ".layers.0." in name and "bias" not in name} == {
        f"base_model.model.model.layers.0.{module}.lora_{which}.weight"
        for module in ("self_attn.o_proj", "mlp.down_proj")
        for which in "AB"
    }
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (1, pico.VOCABULARY)
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_B"].shape == (pico.HIDDEN, 1)


def test_the_command_line(tmp_path: Path) -> None:
    pico.save(tmp_path / "base", "llama")
    direction = pico.direction_file(tmp_path / "r.safetensors")
    words = ("convert", tmp_path / "base", tmp_path / "adapter", "--adapter", "peft", "--direction", direction)
    assert run_here(*words, "--patch", tmp_path / "a.patch").code == 2
    assert not (tmp_path / "adapter").exists()
    ran = run_here(*words)
    assert ran.code == 0 and "LoRA of rank 1" in ran.out and "merged" in ran.out and "not measured" in ran.out
    assert run_here(*words).code == 1
    again = run_here(*words, "--overwrite", "--json")
    assert again.code == 0 and json.loads(again.out)["schema"] == "abliteration-adapter/1"


def test_a_calibrated_adapter_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from abliterate import adapting

    pico.save(tmp_path / "base", "llama", tokenizer=True)
    (tmp_path / "quick.yaml").write_text(
        "name: quick\ncalibration: {train: 8, validation: 2, test: 1}\n"
        "direction: {filter: false, refusal_tokens: [I, S], positions: 2}\n"
        "selection: {max_kl: 1000000.0, min_induce: -1000000.0}\n"
    )
    recipe = load_recipe(str(tmp_path / "quick.yaml"))

    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(adapting, "make_adapter", stop)
        adapt(str(tmp_path / "base"), tmp_path / "adapter", recipe=recipe)
    assert not (tmp_path / "adapter").exists()
    with monkeypatch.context() as patch:
        patch.setattr("abliterate.find.mean_hidden", stop)
        adapt(str(tmp_path / "base"), tmp_path / "adapter", recipe=recipe)
    manifest = json.loads((tmp_path / "adapter" / "abliteration.json").read_text())
    assert manifest["selection"]["pick"] and manifest["calibration"]
    conversion.convert(str(tmp_path / "base"), tmp_path / "out", recipe=recipe, evaluate=False)
    _assert_same(tmp_path)
