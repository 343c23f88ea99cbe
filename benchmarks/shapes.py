"""Tensors and config.json of models that many people convert, with as many decoder layers as a benchmark wants."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model of any depth.

    Attributes:
        config: of config.json, as published; `layers` of it is put in where the text model's settings are.
        first: tensors before the layers, in the order in which they are saved.
        layer: tensors of one layer, by its number.
        last: tensors after the layers.
    """

    config: Config
    first: Shapes
    layer: Callable[[int], Shapes]
    last: Shapes

    def shapes(self, layers: int) -> Shapes:
        """Every tensor of a model that deep."""
        numbered = [self.layer(index) for index in range(layers)]
        return self.first | {name: shape for layer in numbered for name, shape in layer.items()} | self.last

    def config_of(self, layers: int) -> Config:
        """The config.json of a model that deep."""
        made: Config = json.loads(json.dumps(self.config))
        made.get("text_config", made)["num_hidden_layers"] = layers
        return made

    def layers_in(self, target: int) -> int:
        """How many layers make about `target` bytes, at least one."""
        return max(1, round((target - nbytes(self.first | self.last)) / nbytes(self.layer(0))))


def nbytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Size in bf16."""
    return sum(2 * prod(shape) for shape in shapes.values())


def _attention(name: str, config: Config, head: int) -> Shapes:
    hidden, heads, kv = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    shapes: Shapes = {f"{name}k_proj.weight": (kv * head, hidden), f"{name}o_proj.weight": (hidden, heads * head)}
    return shapes | {f"{name}q_proj.weight": (heads * head, hidden), f"{name}v_proj.weight": (kv * head, hidden)}


def _mlp(name: str, hidden: int, wide: int) -> Shapes:
    out, into = (hidden, wide), (wide, hidden)
    return {f"{name}down_proj.weight": out, f"{name}gate_proj.weight": into, f"{name}up_proj.weight": into}


def _norms(name: str, width: int, *norms: str) -> Shapes:
    return {f"{name}{norm}.weight": (width,) for norm in norms}


def _untied(config: Config, layer: Callable[[int], Shapes]) -> Model:
    hidden, table = config["hidden_size"], (config["vocab_size"], config["hidden_size"])
    last: Shapes = {"model.norm.weight": (hidden,), "lm_head.weight": table}
    return Model(config, {"model.embed_tokens.weight": table}, layer, last)


def llama(hidden: int, wide: int, heads: int, vocabulary: int = 128_256) -> Model:
    """A Llama 3, untied, with 8 key and value heads."""
    config: Config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128_000,
        "eos_token_id": 128_009,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": wide,
        "max_position_embeddings": 8192,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocabulary,
    }

    def layer(index: int) -> Shapes:
        name = f"model.layers.{index}."
        norms = _norms(name, hidden, "input_layernorm", "post_attention_layernorm")
        attention = _attention(f"{name}self_attn.", config, hidden // heads)
        return attention | _mlp(f"{name}mlp.", hidden, wide) | norms

    return _untied(config, layer)


def qwen3_moe() -> Model:
    """Qwen3-30B-A3B: every expert a tensor of its own."""
    config: Config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "bos_token_id": 151_643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151_645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40_960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 151_936,
    }

    def layer(index: int) -> Shapes:
        name, hidden = f"model.layers.{index}.", 2048
        shapes = _norms(name, hidden, "input_layernorm", "post_attention_layernorm")
        shapes |= _attention(f"{name}self_attn.", config, 128) | _norms(f"{name}self_attn.", 128, "k_norm", "q_norm")
        shapes |= {f"{name}mlp.gate.weight": (128, hidden)}
        for expert in range(128):
            shapes |= _mlp(f"{name}mlp.experts.{expert}.", hidden, 768)
        return shapes

    return _untied(config, layer)


def gemma3() -> Model:
    """Gemma-3-27B: tied, norms behind the writers, and eyes."""
    text: Config = {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    eyes: Config = {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config: Config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255_999,
        "eoi_token_index": 256_000,
        "image_token_index": 262_144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": eyes,
    }
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")

    def layer(index: int) -> Shapes:
        name, hidden = f"language_model.model.layers.{index}.", 5376
        shapes = _norms(name, hidden, *(f"{norm}_layernorm" for norm in norms))
        shapes |= _attention(f"{name}self_attn.", text, 128) | _norms(f"{name}self_attn.", 128, "k_norm", "q_norm")
        return shapes | _mlp(f"{name}mlp.", hidden, 21_504)

    first: Shapes = {"language_model.model.embed_tokens.weight": (262_208, 5376)}
    bridge: Shapes = {
        "multi_modal_projector.mm_input_projection_weight": (1152, 5376),
        "multi_modal_projector.mm_soft_emb_norm.weight": (1152,),
    }
    return Model(config, _siglip(eyes) | bridge | first, layer, {"language_model.model.norm.weight": (5376,)})


def _siglip(eyes: Config) -> Shapes:
    wide, inner, patch = (eyes[key] for key in ("hidden_size", "intermediate_size", "patch_size"))
    name = "vision_tower.vision_model."
    places = (eyes["image_size"] // patch) ** 2
    shapes: Shapes = {
        f"{name}embeddings.patch_embedding.weight": (wide, 3, patch, patch),
        f"{name}embeddings.position_embedding.weight": (places, wide),
    }
    made: Shapes = {"embeddings.patch_embedding": (wide,), "post_layernorm": (wide,)}
    for index in range(eyes["num_hidden_layers"]):
        layer = f"encoder.layers.{index}."
        for projection in ("k_proj", "out_proj", "q_proj", "v_proj"):
            made[f"{layer}self_attn.{projection}"] = (wide, wide)
        made |= {f"{layer}layer_norm1": (wide,), f"{layer}layer_norm2": (wide,)}
        made |= {
            f"{layer}mlp.fc1": (eyes["intermediate_size"], wide),
            f"{layer}mlp.fc2": (wide, inner),
        }
    for module, shape in made.items():
        if not module.startswith("embeddings"):
            shapes[f"{name}{module}.weight"] = shape
        shapes[f"{name}{module}.bias"] = shape[:1]
    return shapes


MODELS: Mapping[str, Callable[[], Model]] = {
    "llama-1b": lambda: llama(2048, 8192, 32, 32_000),
    "llama-3-8b": lambda: llama(4096, 14_336, 32),
    "llama-3-70b": lambda: llama(8192, 28_672, 64),
    "qwen3-30b-a3b": qwen3_moe,
    "gemma-3-27b": gemma3,
}
"""By the names that `--shape` takes."""
