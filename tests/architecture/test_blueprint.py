"""Transformers' model of a config, on the meta device: its parameters, and which stored tensor fills which."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig

from abliterate.architecture.blueprint import Blueprint, Place, blueprint_of, model_class, read_blueprint, read_config
from abliterate.checkpoint.files import open_checkpoint
from abliterate.errors import ArchitectureError
from tests import pico
from tests.architecture.planned import Checkpoints, H

ALL = (*pico.FAMILIES, *pico.OTHERS)
V = pico.VOCABULARY


def config_of(family: str, **more: Any) -> PreTrainedConfig:
    tied = {"tie_word_embeddings": family in pico.TIED}
    made: PreTrainedConfig = AutoConfig.for_model(family, **{**{**pico.CONFIGS, **pico.OTHERS}[family], **tied, **more})
    return made


def blueprint(family: str, **more: Any) -> Blueprint:
    return blueprint_of(config_of(family, **more), AutoModelForCausalLM.from_config)


@pytest.mark.parametrize("family", ALL)
def test_it_is_the_model_without_its_weights(family: str) -> None:
    made, real = blueprint(family), pico.build(family)
    assert made.class_name == type(real).__name__ and made.hidden_size == H
    assert made.shapes == {name: tuple(tensor.shape) for name, tensor in real.state_dict().items()}
    assert all(parameter.is_meta for parameter in made.model.parameters())
    assert made.shapes[made.embedding][0] == V and made.embedding.endswith("weight")
    assert made.head is not None and made.shapes[made.head] == (V, H)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ALL)
def test_a_checkpoint_fills_it(checkpoint: Checkpoints, family: str, tied: bool) -> None:
    folder = checkpoint(family, {"tied": tied})
    saved = open_checkpoint(folder)
    made = read_blueprint(folder, saved.config)
    places = made.places(saved.tensors)
    assert list(places) == list(saved.tensors) and all(place.parameters for place in places.values())
    filled = [name for place in places.values() for name in place.parameters]
    assert set(filled) <= set(made.shapes) and made.missing(filled) == []
    for name, place in places.items():
        if not place.converted:
            assert made.shapes[place.parameters[0]] == saved.tensors[name].shape
    assert made.tied is tied and (made.missing([]) != [])


def test_what_is_missing() -> None:
    made = blueprint("llama")
    names = list(made.shapes)
    assert made.missing(names) == [] and made.missing(names[1:]) == names[:1]
    assert made.missing([]) == names
    tied = blueprint("llama", tie_word_embeddings=True)
    everything = [name for name in tied.shapes if name != "lm_head.weight"]
    assert "lm_head.weight" in tied.shapes and tied.missing(everything) == []
    assert tied.missing([*everything[1:], "lm_head.weight"]) == []
    both = [name for name in everything if name != "model.embed_tokens.weight"]
    assert set(tied.missing(both)) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("family", "name", "place"),
    [
        ("llama", "model.norm.weight", Place(("model.norm.weight",))),
        ("llama", "norm.weight", Place(("model.norm.weight",))),
        ("llama", "model.lm_head.weight", Place(("lm_head.weight",))),
        ("llama", "lm_head.weight", Place(("lm_head.weight",))),
        ("llama", "foo.norm.weight", Place(())),
        ("llama", "model.norm", Place(())),
        ("llama", "", Place(())),
        ("gpt2", "h.0.ln_1.bias", Place(("transformer.h.0.ln_1.bias",))),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
            Place(("model.layers.1.mlp.experts.down_proj",), converted=True),
        ),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.0.w3.weight",
            Place(("model.layers.1.mlp.experts.gate_up_proj",), converted=True),
        ),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", Place(("model.layers.1.mlp.gate.weight",))),
        ("mixtral", "model.layers.9.block_sparse_moe.experts.3.w2.weight", Place((), converted=True)),
    ],
)
def test_places(family: str, name: str, place: Place) -> None:
    assert blueprint(family).places([name]) == {name: place}


def test_shared_parameters() -> None:
    tied = blueprint("gpt2")
    assert tied.tied and tied.aliases == {"lm_head.weight": "transformer.wte.weight"} and tied.untied() == {}
    apart = blueprint("gpt2", tie_word_embeddings=False)
    assert not apart.tied and apart.aliases == {} and apart.head == "lm_head.weight"
    zamba = blueprint("zamba", tie_word_embeddings=True)
    assert zamba.tied and len(zamba.aliases) > len(zamba.untied())


def test_untying_leaves_the_blueprint_as_it_was() -> None:
    tied = blueprint("llama", tie_word_embeddings=True)
    assert tied.untied() == {} and tied.tied and tied.model.config.tie_word_embeddings is True


def test_a_narrow_embedding_is_no_head_of_the_stream_s_width() -> None:
    made = blueprint("opt", word_embed_proj_dim=32)
    assert made.hidden_size == H and made.shapes[made.embedding] == (V, 32) and made.tied


@pytest.fixture
def llama(checkpoint: Checkpoints) -> Iterator[Path]:
    yield checkpoint("llama")


def test_the_class_that_config_json_names(llama: Path) -> None:
    config = read_config(llama, open_checkpoint(llama).config)
    for content in ({"architectures": ["LlamaForCausalLM"]}, {}, {"architectures": None}, {"architectures": ["Own"]}):
        assert model_class(config, content) is LlamaForCausalLM
    other = model_class(config, {"architectures": ["LlamaForTokenClassification"]})
    assert other.__name__ == "LlamaForTokenClassification"
    for odd in ("torch", "AutoConfig", "LlamaConfig", "nn", 3, None):
        assert model_class(config, {"architectures": [odd]}) is LlamaForCausalLM
    with pytest.raises(ArchitectureError, match="no model that generates text for model type clip"):
        model_class(AutoConfig.for_model("clip"), {})


def test_a_class_of_another_model_type_is_not_taken(llama: Path) -> None:
    """Transformers goes by the model type; to refuse is as good."""
    config = read_config(llama, open_checkpoint(llama).config)
    with suppress(ArchitectureError):
        assert model_class(config, {"architectures": ["Gemma2ForCausalLM"]}) is LlamaForCausalLM


def test_what_transformers_does_not_know(llama: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"^model type strange is not known to transformers \d.*; a newer"):
        read_blueprint(llama, {"model_type": "strange"})
    with pytest.raises(ArchitectureError, match="own code can be run with --trust-remote-code; a newer"):
        read_blueprint(llama, {"model_type": "strange", "auto_map": {}})


@pytest.mark.parametrize("error", ["num_attention_heads", "rope_parameters"])
def test_a_config_that_makes_the_model_s_code_fail(llama: Path, error: str) -> None:
    folder = pico.rewrite(llama, config={error: "x"})
    with pytest.raises(ArchitectureError, match=r"^transformers \d.* cannot build a llama from this config.json: "):
        read_blueprint(folder, open_checkpoint(folder).config)


def test_each_config_has_a_blueprint_of_its_own(llama: Path) -> None:
    """They are kept, by what config.json says and not by where it lies."""
    config = open_checkpoint(llama).config
    first = read_blueprint(llama, config)
    assert read_blueprint(llama, dict(config)) is first
    wider = pico.rewrite(llama, config={"intermediate_size": 80})
    second = read_blueprint(wider, open_checkpoint(wider).config)
    assert first.shapes["model.layers.0.mlp.up_proj.weight"] == (72, H)
    assert second.shapes["model.layers.0.mlp.up_proj.weight"] == (80, H)
