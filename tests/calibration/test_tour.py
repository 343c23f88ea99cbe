"""Where the stream is reached in a loaded model, and that what is done there is what an edit of the weights does."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from abliterate import convert
from abliterate.architecture.plan import plan_architecture
from abliterate.architecture.writer import Plan, Runtime
from abliterate.calibration.hooks import Steer
from abliterate.calibration.load import load_resident
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.tour import accepted, find_stream, run
from abliterate.checkpoint.files import open_checkpoint
from abliterate.errors import ArchitectureError, CalibrationError
from tests import pico

Saved = Callable[[str], Path]
R = pico.unit()
PROMPTS = [[7, 20, 33, 41, 90, 12, 55], [8, 9, 100, 101], [60, 61, 62, 63, 64, 65]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return functools.cache(lambda family: pico.save(tmp_path_factory.mktemp("tour") / "m", family, tied=False))


def planned(folder: Path) -> Plan:
    return plan_architecture(open_checkpoint(folder))


def resident(folder: Path) -> LanguageModel:
    return load_resident(folder, planned(folder), device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("family", [*pico.FAMILIES, *pico.OTHERS])
def test_every_writer_of_a_layer_is_reached(saved: Saved, family: str) -> None:
    folder = saved(family)
    plan, stream = planned(folder), resident(folder).stream
    assert stream.unreached == () and len(stream.writers) == len(stream.names) == len(set(stream.names))
    assert len(set(map(id, stream.writers))) == len(stream.writers)
    assert len(stream.layers) == plan.num_layers and stream.hidden_size == pico.HIDDEN and stream.head is None
    assert stream.sometimes == frozenset() and (stream.transport is None) is (not plan.boundaries)
    for i in range(plan.num_layers):
        sublayers = 1 if family == "zamba" else 2
        assert sum(f".{i}." in name.removesuffix(".experts.0.w2") for name in stream.names) >= sublayers


@pytest.mark.parametrize("family", [*pico.FAMILIES, *pico.OTHERS])
def test_of_every_writer_the_layer_and_the_kind(saved: Saved, family: str) -> None:
    """As the plan has them, weights and biases of one module together."""
    folder = saved(family)
    plan, stream = planned(folder), resident(folder).stream
    assert len(stream.places) == len(stream.writers)
    expected = {(w.layer, w.kind) for w in plan.writers if w.kind != "bias" and w.layer is not None}
    assert {place for place in stream.places if place[1] != "bias" and place[0] is not None} == expected
    # A bias that stands alone: of BERT's norms on the skip path.
    assert family == "bert" or all(kind != "bias" for _, kind in stream.places)
    for name, (layer, _) in zip(stream.names, stream.places, strict=True):
        assert layer is None or f".{layer}." in name


def test_experts_are_reached_where_they_come_together(saved: Saved) -> None:
    model = resident(saved("mixtral"))
    modules = {id(module): name for name, module in model.model.named_modules()}
    reached = {modules[id(writer)] for writer in model.stream.writers}
    layers = [f"model.layers.{i}" for i in range(3)]
    attention, experts = ({f"{layer}.{name}" for layer in layers} for name in ("self_attn.o_proj", "mlp.experts"))
    gathered = {f"{layer}.mlp" for layer in layers}
    assert reached in [{"model.embed_tokens"} | attention | found for found in (experts, gathered)]
    labels = {name for name in model.stream.names if ".experts." in name}
    assert labels == {f"model.layers.{i}.block_sparse_moe.experts.0.w2" for i in range(3)}


def test_behind_a_norm_it_is_the_norm_that_is_reached(saved: Saved) -> None:
    model = resident(saved("olmo2"))
    names = {f"model.layers.{i}.post_{part}_layernorm" for i in range(3) for part in ("attention", "feedforward")}
    assert set(model.stream.names) == {"model.embed_tokens", *names}
    modules = dict(model.model.named_modules())
    assert {id(modules[name]) for name in names} <= set(map(id, model.stream.writers))


@pytest.mark.parametrize("family", ["mixtral", "minimax", "deepseek_v3", "qwen3_next", "zamba"])
@torch.no_grad()
def test_an_ablation_at_run_time_is_the_edit(saved: Saved, family: str) -> None:
    """Experts summed up, mixers, layers with latent attention, and a direction that turns on its way."""
    folder = saved(family)
    direction = pico.direction_file(folder.parent / "r.safetensors")
    result = convert(str(folder), folder.parent / "out", direction=direction, evaluate=False)
    assert result.holds
    model, edited = resident(folder), resident(result.folder)
    for batch in model.forward(PROMPTS, [Steer(ablate=R), Steer(), Steer(ablate=R)]):
        for row, logits in zip(batch.rows, batch.logits, strict=True):
            ids = torch.tensor([PROMPTS[row]])
            after, before = (each.model(ids).logits[0, -1] for each in (edited, model))
            expected = before if row == 1 else after
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
            assert float((after - before).abs().max()) > 0.05


def test_layers_that_only_images_bring_to_life_are_passed_on(saved: Saved) -> None:
    plan = planned(saved("llama"))
    assert find_stream(pico.build("llama"), replace(plan, sometimes=(1,))).sometimes == frozenset({1})


def test_names_that_the_model_does_not_have(saved: Saved) -> None:
    plan, model = planned(saved("llama")), pico.build("llama")
    for layers in ((), ("model.blocks.0",), (*plan.runtime.layers, "model.layers.9")):
        with pytest.raises(ArchitectureError, match="LlamaForCausalLM has no module"):
            find_stream(model, replace(plan, runtime=replace(plan.runtime, layers=layers)))


def test_writers_that_cannot_be_reached_are_named(saved: Saved) -> None:
    plan, model = planned(saved("llama")), pico.build("llama")
    writer = next(writer.tensor for writer in plan.writers if "1.mlp.down_proj.weight" in writer.tensor)
    elsewhere = {**plan.runtime.writers, writer: "model.layers.1.nowhere.weight"}
    stream = find_stream(model, replace(plan, runtime=replace(plan.runtime, writers=elsewhere)))
    assert stream.unreached == (writer,)
    without = {name: place for name, place in plan.runtime.writers.items() if name != writer}
    runtime = Runtime(plan.runtime.class_name, plan.runtime.layers, without)
    assert find_stream(model, replace(plan, runtime=runtime)).unreached == (), "transformers does not run it"


def test_a_tied_head_is_reached_where_it_is_asked_for(saved: Saved) -> None:
    plan, model = planned(saved("gpt2")), pico.build("gpt2")
    assert find_stream(model, plan).head is None
    assert find_stream(model, plan, tied_head=True).head is model.get_output_embeddings()


def test_a_model_is_left_as_it_was(saved: Saved) -> None:
    model = pico.build("llama")
    find_stream(model, planned(saved("llama")))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Odd(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.layer = error, nn.Linear(2, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise self.error


def test_code_that_fails_is_said_in_one_line() -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(CalibrationError, match=r"^Odd of transformers \d.* does not run.*: it is odd$"):
        run(Odd(ValueError("\nit is odd\nand more")), {"input_ids": ids, "use_cache": False})
    with pytest.raises(CalibrationError, match=r"does not run.*: KeyError$"):
        run(Odd(KeyError()), {"input_ids": ids})
    with pytest.raises(torch.OutOfMemoryError):
        run(Odd(torch.OutOfMemoryError("full")), {"input_ids": ids})


def test_a_model_is_given_what_it_takes() -> None:
    inputs = {"input_ids": 1, "use_cache": False, "attention_mask": 2}
    assert accepted(Odd(ValueError()), inputs) == {"input_ids": 1}
    assert accepted(pico.build("llama"), inputs) == inputs
