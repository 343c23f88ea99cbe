"""The config of a large model to the settings of a tiny one: every switch stays, sizes alone change.

The width becomes `HIDDEN`, which no other dimension has where the class leaves a choice, so that the hidden axis of a
tensor can be told by its length. Settings are known by their names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

HIDDEN = 48
"""The width of a twin's residual stream."""
VOCABULARY = 103
"""The number of tokens of a twin."""
SPECIAL = 50
"""Tokens from this one on may have a meaning to a twin, as may 0 to 3; those between have none."""
_BESIDE = 32  # the width of what stands beside the language model: towers, resamplers, projectors
_HEADS, _HEADS_BESIDE, _HEAD = 4, 2, 16
_LAYERS, _LAYERS_BESIDE, _MOST_KINDS = 4, 2, 8

Settings = Mapping[str, Any]


def _table(sizes: Mapping[str, int]) -> tuple[tuple[re.Pattern[str], int], ...]:
    return tuple((re.compile(pattern), size) for pattern, size in sizes.items())


# What says nothing of the structure, or what a twin has of its own.
_DROPPED = re.compile(
    "_.*|architectures|auto_map|(torch_)?dtype|transformers_version|(quantization|compression)_config|id2label|label2id"
    "|task_specific_params|use_mamba_kernels|name_or_path"
)
_PART_BESIDE = re.compile(
    ".*(vision|visual|image|audio|speech|acoustic|vq|codec|qformer|perceiver|resampler|connector|tokenizer|sam|dit_"
    "|encoder_config|high_res|talker|code2wav|adapter).*"
)
_DEPTHS: tuple[str, ...] = (
    *("num_hidden_layers", "decoder_layers", "num_decoder_layers", "n_layer", "n_layers", "num_layers"),
    *("num_transformer_layers", "num_blocks", "layers", "depth", "encoder_layers", "num_encoder_layers"),
)
_KINDS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
_FIRST_LAYERS = re.compile("first_k_dense_replace|(num|n|first)_dense_layers|moe_layer_start_index|max_window_layers")
_LAST_LAYERS = re.compile("num_kv_shared_layers")
_SOME_LAYERS = re.compile(".*(layer_ids|layer_indices|layers_indices|_layers|attn_idxs|(attn|block|visual)_indexes)")
_PERIOD = re.compile(
    ".*(_period|_interval|_freq|_frequency|_every_n_layers|_sparse_step|_layer_step|window_pattern|layer_group_size)"
)
_ROPE = re.compile("rope_(parameters|scaling)")
_TOKEN = re.compile(".*token_(id|ids|index|indices)|(im|image|video|audio)_.*id")
_QUERY_HEADS = re.compile("(.*_)?(n|num)_((attention|query|attn)_)?heads?(_per_layer)?|(.*_)?attention_heads")
_KEY_HEADS = re.compile(".*(key_value_heads|kv_heads|kv_n_heads|n_head_kv|query_group_num)")
_WIDTH = re.compile("hidden_sizes?|d_model|(n|emb|embed|model)_dim|n_embe?d|dim_model|dim")
_EMBEDDING = re.compile("((in|out)put_)?embedding_(size|dim)|word_embed_proj_dim")
# Sizes by name, wherever they stand; the first pattern that matches the whole name counts. Unless it has to be, none
# is `HIDDEN`, and neither is a product or a sum of such as go together.
_SIZES = _table(
    {
        "vision_output_dim|projector_(in|out)put_dim": 2 * _BESIDE,
        ".*(hidden_size_global|out_hidden_size|text_hidden_size|adapter_out_dim|output_dim|projection_dim)": HIDDEN,
        "(encoder|vision)_hidden_size|adapter_in(put)?_(dim|size)": _BESIDE,
        ".*shared.*(intermediate_size|_dim)": 60,
        ".*(moe|expert).*(intermediate_size|ffn_hidden_size|_dim)": 56,
        ".*dense.*intermediate_size": 68,
        ".*(intermediate_size.*|ffn_dim|ffn_hidden_size|_inner|d_ff|dff|dim_ff|feed_forward_size|mlp_dim)": 72,
        "d_head": HIDDEN // _HEADS,
        ".*(qk_rope_head_dim|qk_nope_head_dim|rotary_dim)|linear_.*head_dim": 8,
        ".*v_head_dim": 10,
        "attention_head_dim": 2 * HIDDEN // _HEADS,
        "global_head_dim": 2 * _HEAD,
        ".*(head_?dim|d_head|dim_head|head_size|d_kv|kv_channels)": _HEAD,
        ".*kv_lora_rank": 18,
        ".*q_lora_rank": 26,
        "o_lora_rank": 28,
        ".*_(low)?rank": 12,
        ".*(d_state|state_size)": 8,
        "mamba_d_ssm|attention_hidden_size": 2 * HIDDEN,
        "mamba_(n|num)_heads|n_mamba_heads": 2 * HIDDEN // _HEAD,
        "lru_width": 44,
        "hidden_size_per_layer_input|ple_embed_dim|moe_latent_size|router_hidden_size": 20,
        "(base|output|latent)_channels|downsample_.*size|codebook_dim": _BESIDE,
        "mm_tokens_per_image": 4,
    }
)
# Of these there are at most so many in a twin.
_COUNTS = _table(
    {
        ".*experts_per_tok(en)?|moe_(top)?k|moe_top_k|top_k_experts": 2,
        ".*shared_experts?": 2,
        ".*experts|zero_expert_num": 4,
        "n_groups?|num_expert_group|mamba_n_?groups|.*hc_mult|index_n_heads|linear_num_key_heads|type_vocab_size": 2,
        "linear_.*heads": 4,
        "topk_group": 1,
        "codebook_size|num_embeddings|num_position_embeddings|original_max_position_embeddings|index_topk": 64,
        ".*vocab(_size.*)?": VOCABULARY,
        "n_positions|n_ctx|.*position_embeddings|max_.*(positions|seq_len|length)|seq_len(gth)?|context_length": 128,
        ".*(sliding_window(_size)?|attention_window_size|chunk_size|local_attention)|patch_size|num_filters": 8,
        "window_size|image_size": 32,
        "(num|n)_.*layers.*": 2,
        ".*(_size|_dim|_dims|_width|_channels|_features)": 64,
    }
)


@dataclass(frozen=True)
class _Scope:
    """A part of a config: the language model's, or one beside it.

    Attributes:
        settings: as they were.
        beside: whether it is of a tower, a projector, and the like.
        width: the width of the language model's residual stream, as it was.
        depth: the number of layers; 0 where the part has none.
        kept: the layers that stay.
        tokens: what becomes of the ids of tokens.
    """

    settings: Settings
    beside: bool
    width: int
    depth: int
    kept: tuple[int, ...]
    tokens: Mapping[int, int]

    @property
    def heads(self) -> int:
        return _HEADS_BESIDE if self.beside else _HEADS

    @property
    def turned(self) -> int:
        """The width of a head in the twin, or of the part that rotary positions turn."""
        if self.settings.get("qk_rope_head_dim"):
            return 8
        return _HEAD if self.beside or "head_dim" in self.settings else HIDDEN // _HEADS


def shrink(config: Settings) -> dict[str, Any]:
    """Settings of the tiny twin of a model: the same switches, small sizes.

    Args:
        config: the whole content of a config.json, or `to_dict()` of a config. What is not in it keeps the default of
            its class, which may be large.

    Returns:
        Keyword arguments for the class of the config. A layer of every kind stays, in the order of the layers.
    """
    found = sorted({value for key, value in _numbers(config) if _TOKEN.fullmatch(key) and value > 3})
    tokens = {token: SPECIAL + place % (VOCABULARY - SPECIAL) for place, token in enumerate(found)}
    small = _shrink(config, beside=False, width=stream_width(config), tokens=tokens)
    return {key: value for key, value in small.items() if key != "model_type"}


def _numbers(settings: Settings) -> Iterator[tuple[str, int]]:
    """All whole numbers of a config by name, those in parts and in lists as well."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        for number in value if isinstance(value, list | tuple) else [value]:
            if type(number) is int:
                yield str(key), number


def stream_width(settings: Settings) -> int:
    """The width of the residual stream, 0 where it is not said."""
    own = [value for key, value in settings.items() if _WIDTH.fullmatch(key) and type(value) is int]
    parts = [value for key, value in settings.items() if _is_part(key, value) and not _PART_BESIDE.fullmatch(key)]
    return own[0] if own else next((width for part in parts if (width := stream_width(part))), 0)


def _is_part(key: str, value: Any) -> bool:
    named = key.endswith("config") and key != "per_layer_config"
    return isinstance(value, Mapping) and (named or "model_type" in value)


def _shrink(settings: Settings, *, beside: bool, width: int, tokens: Mapping[int, int]) -> dict[str, Any]:
    depth = _depth(settings)
    kept = _kept(settings, depth, _LAYERS_BESIDE if beside else _LAYERS)
    scope = _Scope(settings, beside, width, depth, kept, tokens)
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if _is_part(key, value) and not _DROPPED.fullmatch(key):
            aside = beside or _PART_BESIDE.fullmatch(key) is not None
            small[key] = _shrink(value, beside=aside, width=width, tokens=tokens)
        elif not _DROPPED.fullmatch(key):
            small[key] = _value(key, value, scope)
    return small


def _depth(settings: Settings) -> int:
    said = [settings[key] for key in _DEPTHS if type(settings.get(key)) is int]
    listed = [len(settings[key]) for key in _KINDS if settings.get(key)]
    return (said or listed or [0])[0]


def _kept(settings: Settings, depth: int, least: int) -> tuple[int, ...]:
    """One layer of every kind, and then more of those kinds that there are fewest of."""
    said = [of for key, value in settings.items() if (of := _of_layers(key, value, depth)) is not None]
    kinds = [repr([of[layer] for of in said]) for layer in range(depth)]
    kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:_MOST_KINDS]
    while len(kept) < min(least, depth):
        left = [layer for layer in range(depth) if layer not in kept]
        kept.append(min(left, key=lambda layer: sum(kinds[other] == kinds[layer] for other in kept)))
    return tuple(sorted(kept))


def _of_layers(key: str, value: Any, depth: int) -> Sequence[Any] | None:
    """What a setting says of each layer; None where it says nothing of layers."""
    layers = range(depth)
    if key == "per_layer_config" and value:
        places = {int(place): over for place, over in value.items()}
        return [places.get(layer) for layer in layers]
    if _is_layer_list(key, value, depth):
        return [layer in value for layer in layers]
    if (isinstance(value, list | tuple) or key in _KINDS) and value and len(value) == depth > 2:
        return cast(Sequence[Any], value)
    if type(value) is int and _FIRST_LAYERS.fullmatch(key):
        return [layer < value for layer in layers]
    if type(value) is int and _LAST_LAYERS.fullmatch(key):
        return [layer >= depth - value for layer in layers]
    return None


def _is_layer_list(key: str, value: Any, depth: int) -> bool:
    """Whether a list holds numbers of layers, not something of every layer."""
    if not isinstance(value, list | tuple) or not _SOME_LAYERS.fullmatch(key):
        return False
    return all(type(item) is int and 0 <= item < depth for item in value) and list(value) == sorted(set(value))


def _value(key: str, value: Any, scope: _Scope) -> Any:
    if key == "use_cache":
        return False
    if key == "head_dim" and value is None:
        return _HEAD
    if isinstance(value, Mapping) and _ROPE.fullmatch(key):
        return _rope(value, scope)
    of_layers = _of_layers(key, value, scope.depth)
    if of_layers is not None:
        return _recut(key, value, [of_layers[layer] for layer in scope.kept], scope)
    return _sized(key, value, scope)


def _sized(key: str, value: Any, scope: _Scope) -> Any:
    if isinstance(value, list | tuple):
        return [_sized(key, item, scope) for item in value]
    return _number(key, value, scope) if type(value) is int else value


def _recut(key: str, value: Any, of_kept: Sequence[Any], scope: _Scope) -> Any:
    """What a setting says of layers, of those that stay."""
    if isinstance(value, Mapping):
        return {layer: _over(over, scope) for layer, over in enumerate(of_kept) if over}
    if isinstance(value, str):
        return "".join(of_kept)
    if type(value) is int:
        return sum(of_kept)
    if _is_layer_list(key, value, scope.depth):
        return [layer for layer, there in enumerate(of_kept) if there]
    return _sized(key, list(of_kept), scope)


def _over(settings: Settings, scope: _Scope) -> dict[str, Any]:
    """Settings of one layer that stand in for those of the part."""
    over = replace(scope, settings={**scope.settings, **settings})
    small = {key: _value(key, value, over) for key, value in settings.items()}
    for key, value in small.items():
        other = scope.settings.get(key)
        if type(value) is int and settings[key] != other and value == _value(key, other, scope) and "nope" not in key:
            small[key] = 2 * value  # what differs in some layers shall differ; but the parts of a head must add up
    return small


def _rope(value: Settings, scope: _Scope) -> dict[str, Any]:
    """Rotary settings, whose lists have one entry a pair of dimensions, or add up to the number of pairs."""
    if any(isinstance(inside, Mapping) for inside in value.values()):
        return {key: _rope(inside, scope) if isinstance(inside, Mapping) else inside for key, inside in value.items()}
    rope, turned = dict(value), scope.turned
    if rope.get("partial_rotary_factor"):
        part = turned * rope["partial_rotary_factor"]
        if scope.settings.get("qk_rope_head_dim") or part < 2 or int(part) % 2:
            rope["partial_rotary_factor"] = 0.5
        turned = turned if scope.settings.get("qk_rope_head_dim") else int(turned * rope["partial_rotary_factor"])
    for key, inside in rope.items():
        if key.endswith("_section") and isinstance(inside, list | tuple):
            rope[key] = [(turned // 2 + place) // len(inside) for place in range(len(inside))]
        elif isinstance(inside, list | tuple):
            rope[key] = list(inside)[: turned // 2]
        elif key == "original_max_position_embeddings" and inside:
            rope[key] = _size(key, inside, scope)
    return rope


def _number(key: str, value: int, scope: _Scope) -> int:
    layers = len(scope.kept) or _LAYERS_BESIDE
    if re.fullmatch(".*feature_layers?", key):
        return max(-2, min(value, 1))
    if _TOKEN.fullmatch(key):
        return scope.tokens.get(value, value)
    if value <= 0:
        return value
    if key in _DEPTHS:
        return layers if value == scope.depth else min(value, layers)
    if _PERIOD.fullmatch(key):
        return min(value, layers)
    if key.endswith("_layer_offset"):
        period = scope.settings.get(key.replace("offset", "period"), value + 1)
        return value * min(int(period), layers) // int(period)
    if _KEY_HEADS.fullmatch(key):
        queries = next((value for key, value in scope.settings.items() if _QUERY_HEADS.fullmatch(key)), 0)
        return scope.heads if value == queries else min(value, scope.heads // 2)
    return _size(key, value, scope)


def _size(key: str, value: int, scope: _Scope) -> int:
    if _WIDTH.fullmatch(key):
        # Qwen2-VL's tower calls its own width `embed_dim`, and that of the language model `hidden_size`.
        stream = value == scope.width and scope.settings.get("embed_dim", value) != value
        return _BESIDE if scope.beside and not stream else HIDDEN
    if _EMBEDDING.fullmatch(key):
        return HIDDEN if value == scope.width else 36
    if key == "head_dim" and value == scope.settings.get("qk_rope_head_dim"):
        return 8
    for pattern, size in _SIZES:
        if pattern.fullmatch(key):
            return size
    if _QUERY_HEADS.fullmatch(key):
        # Mamba 2 calls `num_heads` what others call `mamba_num_heads`; its heads make up `expand` times the width.
        return 2 * HIDDEN // _HEAD if "expand" in scope.settings and key == "num_heads" else scope.heads
    return next((min(value, count) for pattern, count in _COUNTS if pattern.fullmatch(key)), value)
