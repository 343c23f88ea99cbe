"""Tiny twins of real, large configs: their switches stay, their sizes go, and nothing is left at its default."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLForConditionalGeneration,
)

from abliterate.architecture.shrink import HIDDEN, SPECIAL, VOCABULARY, shrink
from abliterate.architecture.twin import build_twin, twin_config
from abliterate.errors import ArchitectureError
from tests.sweep.twins import cases, class_of, save_twin, skipped, token_ids

LLAMA_3_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
DEEPSEEK_V3: Mapping[str, Any] = {
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
GEMMA_3_27B: Mapping[str, Any] = {
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
QWEN3_VL_8B: Mapping[str, Any] = {
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "intermediate_size": 4304,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
REAL: Mapping[str, tuple[Mapping[str, Any], type[PreTrainedModel]]] = {
    "llama": (LLAMA_3_8B, LlamaForCausalLM),
    "deepseek": (DEEPSEEK_V3, DeepseekV3ForCausalLM),
    "gemma": (GEMMA_3_27B, Gemma3ForConditionalGeneration),
    "qwen": (QWEN3_VL_8B, Qwen3VLForConditionalGeneration),
}
OWN = re.compile(".*(use_cache|dtype)|(auto_map|quantization_config).*")
SIZES_THAT_ARE_FLOATS = ("partial_rotary_factor",)


def large(name: str) -> PreTrainedConfig:
    return AutoConfig.for_model(**REAL[name][0])


def twin(name: str, seed: int = 0) -> PreTrainedModel:
    return build_twin(twin_config(large(name)), REAL[name][1], seed)


def switches(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """All settings that are no whole number, and no list of such."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from switches(value, f"{path}{key}.")
        elif type(value) is not int and not isinstance(value, list) and key not in SIZES_THAT_ARE_FLOATS:
            yield f"{path}{key}", value


@pytest.mark.parametrize("name", REAL)
def test_switches_stay(name: str) -> None:
    before, after = dict(switches(large(name).to_dict())), dict(switches(twin_config(large(name)).to_dict()))
    assert {key for key in before if not OWN.fullmatch(key) and before[key] != after[key]} == set()


@pytest.mark.parametrize("name", REAL)
def test_a_config_json_is_shrunk_as_it_is(name: str) -> None:
    small = shrink(REAL[name][0])
    assert "model_type" not in small and "auto_map" not in small and "quantization_config" not in small
    assert small.get("text_config", small)["hidden_size"] == HIDDEN
    assert small.get("text_config", small)["num_hidden_layers"] == 4


def test_sizes_of_a_dense_model() -> None:
    small = shrink(LLAMA_3_8B)
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 2)
    assert (small["vocab_size"], small["pretraining_tp"]) == (VOCABULARY, 1)
    assert small["rope_theta"] == 500000.0 and small["rope_scaling"] is None
    assert small["bos_token_id"] >= SPECIAL and small["bos_token_id"] != small["eos_token_id"]


def test_heads_of_keys_stay_as_many_as_of_queries_or_one() -> None:
    assert shrink(LLAMA_3_8B | {"num_key_value_heads": 32})["num_key_value_heads"] == 4
    assert shrink(LLAMA_3_8B | {"num_key_value_heads": 1})["num_key_value_heads"] == 1
    assert shrink(LLAMA_3_8B | {"num_key_value_heads": None})["num_key_value_heads"] is None


def test_dense_and_sparse_layers_groups_of_experts_and_predicted_tokens_stay() -> None:
    config = twin_config(large("deepseek"))
    assert (config.num_hidden_layers, config.first_k_dense_replace) == (4, 2)
    assert (config.n_routed_experts, config.n_group, config.topk_group, config.num_experts_per_tok) == (4, 2, 1, 2)
    assert (config.n_shared_experts, config.num_nextn_predict_layers) == (1, 1)
    kinds = {type(layer.mlp).__name__ for layer in twin("deepseek").model.layers}
    assert kinds == {"DeepseekV3MLP", "DeepseekV3MoE"}


def test_every_kind_of_layer_stays_in_order() -> None:
    text = twin_config(large("gemma")).get_text_config()
    assert text.layer_types == ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    assert text.rope_parameters["full_attention"]["factor"] == 8.0


def test_layers_that_are_numbered_are_numbered_anew() -> None:
    config = twin_config(large("qwen"))
    assert config.vision_config.depth == 2 and config.vision_config.deepstack_visual_indexes == [1]
    assert config.vision_config.out_hidden_size == HIDDEN != config.vision_config.hidden_size
    assert sum(config.text_config.rope_parameters["mrope_section"]) == config.text_config.head_dim // 2


def test_tokens_keep_apart_and_together() -> None:
    small = shrink(GEMMA_3_27B | {"audio_config": {"model_type": "x", "image_token_id": 262144}})
    assert small["audio_config"]["image_token_id"] == small["image_token_index"] >= SPECIAL
    assert small["eos_token_id"][0] == 1 and len({*small["eos_token_id"], small["image_token_index"]}) == 3


def test_an_unknown_type_is_shrunk_by_the_names_of_its_settings() -> None:
    small = shrink(
        {
            "model_type": "never_heard_of",
            "add_qkv_bias": True,
            "ffn_hidden_size": 13696,
            "hidden_size": 4096,
            "hybrid_override_pattern": "M-M-M-M*-M-M",
            "kv_channels": 128,
            "multi_query_group_num": 2,
            "num_attention_heads": 32,
            "num_layers": 12,
            "padded_vocab_size": 65024,
            "residual_gate": None,
            "seq_length": 32768,
            "some_new_dim": 1024,
            "expert_layer_period": 8,
            "expert_layer_offset": 4,
        }
    )
    assert small == {
        "add_qkv_bias": True,
        "ffn_hidden_size": 72,
        "hidden_size": HIDDEN,
        "hybrid_override_pattern": "M-M*",
        "kv_channels": 16,
        "multi_query_group_num": 2,
        "num_attention_heads": 4,
        "num_layers": 4,
        "padded_vocab_size": VOCABULARY,
        "residual_gate": None,
        "seq_length": 128,
        "some_new_dim": 64,
        "expert_layer_period": 4,
        "expert_layer_offset": 2,
    }


@pytest.mark.parametrize("name", REAL)
def test_the_width_is_no_other_dimension_of_the_language_model(name: str) -> None:
    shapes = {key: p.shape for key, p in twin(name).named_parameters() if "vis" not in key and "projector" not in key}
    assert all(list(shape).count(HIDDEN) <= 1 for shape in shapes.values())
    heads = [shape for key, shape in shapes.items() if "self_attn" in key and len(shape) == 2]
    assert heads and all(size == HIDDEN or HIDDEN not in (size, size // 2, size // 3) for s in heads for size in s)


@pytest.mark.parametrize("name", REAL)
def test_the_same_seed_gives_the_same_twin_and_leaves_torch_as_it_was(name: str) -> None:
    state = torch.random.get_rng_state()
    first, second, other = twin(name).state_dict(), twin(name).state_dict(), twin(name, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in dict(twin(name).named_parameters()))


@pytest.mark.parametrize("name", REAL)
def test_every_parameter_is_random(name: str) -> None:
    for key, parameter in twin(name).named_parameters():
        assert parameter.unique().numel() > 0.9 * parameter.numel(), key
        if "norm" in key and key.endswith("weight") and parameter.dim() == 1:
            assert parameter.min() < 0 < parameter.max()
            assert min(parameter.abs().min(), (1 + parameter).abs().min(), (1 - parameter).abs().min()) > 0.19, key
    buffers = [buffer for key, buffer in twin(name).named_buffers() if key.endswith("e_score_correction_bias")]
    assert all(buffer.count_nonzero() == buffer.numel() for buffer in buffers) and (buffers or name != "deepseek")


@pytest.mark.parametrize("name", REAL)
def test_a_twin_runs_on_text(name: str) -> None:
    model = twin(name)
    with torch.no_grad():
        logits = model(input_ids=torch.randint(6, 40, (2, 16))).logits
    assert logits.shape == (2, 16, VOCABULARY) and logits.isfinite().all() and not model.training
    assert model.config._attn_implementation == "eager"


def test_a_class_of_the_text_part_is_built_of_the_text_part() -> None:
    model = build_twin(twin_config(large("gemma")), Gemma3ForCausalLM, dtype=torch.bfloat16)
    assert model.config.model_type == "gemma3_text" and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_overrides_win_inside_of_parts_as_well() -> None:
    config = twin_config(large("qwen"), {"text_config": {"head_dim": 8}, "tie_word_embeddings": True})
    assert config.text_config.head_dim == 8 and config.text_config.hidden_size == HIDDEN
    assert config.tie_word_embeddings is True


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        (PreTrainedConfig(), {}, "no setting by a known name says how wide it is"),
        (AutoConfig.for_model("llama"), {"hidden_size": 50}, "is not a multiple of the number of attention heads"),
    ],
)
def test_what_has_no_twin_is_said_in_one_line(config: PreTrainedConfig, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ArchitectureError, match=said) as error:
        twin_config(config, overrides)
    assert "\n" not in str(error.value)


def test_a_class_that_cannot_be_built_is_said_in_one_line() -> None:
    with pytest.raises(ArchitectureError, match="no tiny twin of llama can be built") as error:
        build_twin(twin_config(large("llama")), DeepseekV3ForCausalLM)
    assert "\n" not in str(error.value)


def test_the_cases_of_the_sweep() -> None:
    assert list(cases()) == sorted(cases()) and not set(cases()) & set(skipped())
    assert 0.3 < sum(case.ci for case in cases().values()) / len(cases()) < 0.4
    assert all(issubclass(class_of(case), PreTrainedModel) for case in cases().values())


@pytest.mark.parametrize("name", ["gpt2", "gemma4_text:moe", "jamba", "deepseek_v4", "bloom"])
def test_a_saved_twin_loads_and_runs(name: str, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(save_twin(cases()[name], tmp_path, seed=3))
    with torch.no_grad():
        assert loaded(input_ids=token_ids(cases()[name])).logits.isfinite().all()
