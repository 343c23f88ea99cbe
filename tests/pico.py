"""Pico models of every supported family, made on the fly: a few layers, a width that no other dimension has where the
architecture allows, and every parameter drawn at random, since defaults (gains of 1, biases of 0) hide errors."""

import functools
import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HIDDEN, VOCABULARY, POSITIONS = 48, 131, 1024
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
"""The first ids of every model; those of `tokenizer()` go on with printable characters."""
TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{{ message['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
_BASE = _IDS | {"hidden_size": HIDDEN, "max_position_embeddings": POSITIONS}
_GROUPED = _BASE | {
    "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
}  # fmt: skip
_GEMMA = _GROUPED | {"num_hidden_layers": 4, "query_pre_attn_scalar": 10, "sliding_window": 16}
_LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": _GROUPED | {"attention_bias": True, "mlp_bias": True},
    "mistral": _GROUPED | {"sliding_window": 16},
    "qwen2": {key: value for key, value in _GROUPED.items() if key != "head_dim"},
    "qwen3": _GROUPED | {"attention_bias": True},
    "phi3": _GROUPED,
    "gemma2": _GEMMA | {"attention_bias": True},
    "gemma3_text": _GEMMA | {"attention_bias": True, "layer_types": _LAYER_TYPES},
    "gpt2": _IDS | {"n_embd": HIDDEN, "n_layer": 3, "n_head": 4, "n_inner": 72, "n_positions": POSITIONS},
    "gpt_neox": _BASE | {"intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 3},
    "opt": _BASE | {"ffn_dim": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": HIDDEN},
}
FAMILIES = tuple(CONFIGS)
_EXPERTS = {"moe_intermediate_size": 20, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 14, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10,
}  # fmt: skip
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5,
}  # fmt: skip
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "olmo2": {key: value for key, value in _GROUPED.items() if key != "head_dim"},
    "bloom": _IDS | {"hidden_size": HIDDEN, "n_layer": 3, "n_head": 4},
    "bert": _BASE | {"intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "is_decoder": True},
    "mixtral": _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax": _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8},
    "deepseek_v3": _BASE | _EXPERTS | _LATENT | {
        "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
    },
    "qwen3_next": _GROUPED | _EXPERTS | _LINEAR_ATTENTION | {
        "num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 22,
    },
    "zamba": _BASE | {
        "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "attention_head_dim": 24, "n_mamba_heads": 2, "layers_block_type": ["mamba", "hybrid", "hybrid"],
    },
}  # fmt: skip
"""Of architectures with something that none of `CONFIGS` has: norms after sublayers or on the skip path, experts,
mixers, next-token prediction, layers that share weights. Not every test runs through them."""
TIED = frozenset({"gemma2", "gemma3_text", "gpt2", "opt", "bloom", "bert"})
"""Families whose released checkpoints tie the head; so do their pico models where it is not said."""


def build(family: str, *, tied: bool | None = None, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model in fp32; `config` adds to the family's own."""
    tied = family in TIED if tied is None else tied
    chosen = AutoConfig.for_model(family, **{**{**CONFIGS, **OTHERS}[family], "tie_word_embeddings": tied, **config})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(chosen, dtype=torch.float32)
    made = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(_drawn(name, parameter, family in ("gemma2", "gemma3_text"), made))
    return model.eval()


def _drawn(name: str, parameter: Tensor, offset: bool, made: torch.Generator) -> Tensor:
    """Gains of either sign well away from 0, other vectors and matrices normal."""
    if parameter.dim() > 1:
        return torch.randn(parameter.shape, generator=made) / math.sqrt(HIDDEN)
    if name.endswith("bias"):
        return 0.3 * torch.randn(parameter.shape, generator=made)
    sign = torch.randint(0, 2, parameter.shape, generator=made) * 2 - 1
    return sign * (0.5 + torch.rand(parameter.shape, generator=made)) - (1.0 if offset else 0.0)


def save(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool | None = None,
    shards: int = 1,
    tokenizer: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Saves a model as transformers does, in about as many shards as wanted; see `build`."""
    model = build(family, tied=tied, seed=seed, **config).to(dtype)
    nbytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    model.save_pretrained(folder, max_shard_size=nbytes + 1 if shards == 1 else nbytes // shards + 1)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, after `SPECIAL`; with `TEMPLATE` for chat.

    The characters are those of byte-level tokenizers: transformers puts its own pre-tokenizer of that kind before some
    families' vocabularies, whatever the file says.
    """
    alphabet = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
        model_max_length=POSITIONS,
    )


def unit(hidden: int = HIDDEN, seed: int = 0) -> Tensor:
    """A random unit vector [hidden] fp32."""
    drawn: Tensor = torch.randn(hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.div(drawn.norm()).float()


def direction_file(path: Path, hidden: int = HIDDEN, seed: int = 0) -> Path:
    """A direction file with `unit(hidden, seed)` in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"direction": unit(hidden, seed)}, path)
    return path


def rewrite(
    folder: Path,
    *,
    add: Mapping[str, Tensor] | None = None,
    drop: Collection[str] = (),
    rename: Callable[[str], str] = str,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Changes tensors and config.json of a checkpoint in a single file; a config key that is set to None goes."""
    file = folder / "model.safetensors"
    kept = {rename(name): tensor for name, tensor in load_file(file).items() if name not in drop}
    save_file(kept | dict(add or {}), file, metadata=dict(metadata or {"format": "pt"}))
    content = json.loads((folder / "config.json").read_text()) | dict(config or {})
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    return folder
