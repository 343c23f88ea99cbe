"""Plans of whole checkpoints of every family, and a clear no to everything else."""

import functools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.architecture.plan import plan_architecture
from abliterate.architecture.writer import Gain, Plan, Writer
from abliterate.checkpoint.files import open_checkpoint
from abliterate.errors import ArchitectureError
from tests import pico

H = pico.HIDDEN
Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Makes a copy of a family's pico model, changed as `pico.rewrite` says; `made` goes to `pico.save`."""
    models = tmp_path_factory.mktemp("models")

    @functools.cache
    def saved(family: str, made: tuple[tuple[str, Any], ...]) -> Path:
        return pico.save(Path(tempfile.mkdtemp(dir=models)) / "m", family, **dict(made))

    def make(family: str, made: dict[str, Any] | None = None, **changes: Any) -> Path:
        copy = Path(tempfile.mkdtemp(dir=models)) / "m"
        shutil.copytree(saved(family, tuple((made or {}).items())), copy)
        return pico.rewrite(copy, **changes) if changes else copy

    return make


def planned(folder: Path) -> Plan:
    return plan_architecture(open_checkpoint(folder))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ArchitectureError) as caught:
        planned(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in words), message


def kinds(plan: Plan) -> Counter[str]:
    return Counter(writer.kind for writer in plan.writers)


def names(plan: Plan, role: str) -> set[str]:
    return {tensor.name for tensor in plan.roles if tensor.role == role}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", pico.FAMILIES)
def test_every_tensor_has_one_role(checkpoint: Checkpoints, family: str, tied: bool) -> None:
    folder = checkpoint(family, {"tied": tied})
    stored, plan = open_checkpoint(folder).tensors, planned(folder)
    assert [tensor.name for tensor in plan.roles] == list(stored)
    assert all(tensor.reason for tensor in plan.roles)
    assert names(plan, "writer") == {writer.tensor for writer in plan.writers}
    assert len({writer.tensor for writer in plan.writers}) == len(plan.writers)
    assert names(plan, "head") == (set() if tied else {plan.head})
    assert not names(plan, "outside")
    assert plan.model_type == family and plan.hidden_size == H and plan.tied is tied and not plan.head_copy
    layers = json.loads((folder / "config.json").read_text())
    assert plan.num_layers == layers.get("num_hidden_layers", layers.get("n_layer"))
    for writer in plan.writers:
        assert stored[writer.tensor].shape[writer.axis] == H
        assert writer.gain is None or stored[writer.gain.tensor].shape == (H,)


@pytest.mark.parametrize(
    ("family", "count"),
    {
        "llama": {"embedding": 1, "attention": 3, "mlp": 3, "bias": 6},
        "mistral": {"embedding": 1, "attention": 3, "mlp": 3},
        "qwen2": {"embedding": 1, "attention": 3, "mlp": 3},
        "qwen3": {"embedding": 1, "attention": 3, "mlp": 3, "bias": 3},
        "phi3": {"embedding": 1, "attention": 3, "mlp": 3},
        "gemma2": {"embedding": 1, "attention": 4, "mlp": 4, "bias": 4},
        "gemma3_text": {"embedding": 1, "attention": 4, "mlp": 4, "bias": 4},
        "gpt2": {"embedding": 1, "position": 1, "attention": 3, "mlp": 3, "bias": 6},
        "gpt_neox": {"embedding": 1, "attention": 3, "mlp": 3, "bias": 6},
        "opt": {"embedding": 1, "position": 1, "attention": 3, "mlp": 3, "bias": 6},
    }.items(),
)
def test_writers_are_counted(checkpoint: Checkpoints, family: str, count: dict[str, int]) -> None:
    assert kinds(planned(checkpoint(family))) == count


def test_writers_in_the_order_of_a_forward_pass(checkpoint: Checkpoints) -> None:
    gemma = planned(checkpoint("gemma2", {"num_hidden_layers": 1})).writers
    after_attention = Gain("model.layers.0.post_attention_layernorm.weight", 1.0)
    after_mlp = Gain("model.layers.0.post_feedforward_layernorm.weight", 1.0)
    assert gemma == (
        Writer("model.embed_tokens.weight", "embedding", 1, None, None),
        Writer("model.layers.0.self_attn.o_proj.weight", "attention", 0, after_attention, 0),
        Writer("model.layers.0.self_attn.o_proj.bias", "bias", 0, after_attention, 0),
        Writer("model.layers.0.mlp.down_proj.weight", "mlp", 0, after_mlp, 0),
    )
    gpt2 = planned(checkpoint("gpt2", {"n_layer": 12})).writers
    assert [writer.tensor for writer in gpt2[:2]] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert [writer.layer for writer in gpt2[2:]] == [layer for layer in range(12) for _ in range(4)]
    assert {writer.axis for writer in gpt2 if writer.kind in ("attention", "mlp")} == {1}


@pytest.mark.parametrize(
    ("family", "made", "count"),
    [
        ("llama", {"attention_bias": False, "mlp_bias": False}, 0),
        ("llama", {"attention_bias": True, "mlp_bias": False}, 3),
        ("llama", {"attention_bias": False, "mlp_bias": True}, 3),
        ("qwen3", {"attention_bias": False}, 0),
        ("gemma2", {"attention_bias": False}, 0),
        ("gemma3_text", {"attention_bias": False}, 0),
        ("gpt_neox", {"attention_bias": False}, 3),
        ("opt", {"enable_bias": False}, 0),
    ],
)
def test_biases_are_there_as_the_config_says(
    checkpoint: Checkpoints, family: str, made: dict[str, Any], count: int
) -> None:
    assert kinds(planned(checkpoint(family, made)))["bias"] == count
    for switch, on in made.items():
        problem = ["is not accounted for", ".bias "] if on else ["is missing", ".bias "]
        refused(checkpoint(family, made, config={switch: not on}), *problem)


def test_opt_without_what_its_config_leaves_out(checkpoint: Checkpoints) -> None:
    bare = planned(checkpoint("opt", {"layer_norm_elementwise_affine": False}))
    assert not names(bare, "norm")
    unnormed = planned(checkpoint("opt", {"_remove_final_layer_norm": True}))
    assert not any(name.startswith("model.decoder.final") for name in names(unnormed, "norm"))


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("gpt2", "transformer.", ""),
        ("opt", "model.", ""),
        ("llama", "model.", ""),
        ("gpt_neox", "gpt_neox.", "model."),
    ],
)
def test_other_prefixes(checkpoint: Checkpoints, family: str, old: str, new: str) -> None:
    usual = planned(checkpoint(family))
    other = planned(checkpoint(family, rename=lambda name: new + name.removeprefix(old) if old in name else name))
    assert [w.tensor for w in other.writers] == [new + w.tensor.removeprefix(old) for w in usual.writers]
    assert sorted(role.role for role in other.roles) == sorted(role.role for role in usual.roles)
    assert other.layers_prefix == new + usual.layers_prefix.removeprefix(old)
    assert other.head == usual.head


MASK, FREQUENCIES = torch.ones(1, 1, 8, 8, dtype=torch.bool), torch.ones(5)
AS_RELEASED: list[tuple[str, dict[str, Tensor]]] = [
    ("gpt2", {"transformer.h.0.attn.bias": MASK.float(), "transformer.h.2.attn.masked_bias": torch.tensor(-1e4)}),
    ("llama", {"model.layers.1.self_attn.rotary_emb.inv_freq": FREQUENCIES}),
    ("mistral", {"model.layers.1.self_attn.rotary_emb.inv_freq": FREQUENCIES}),
    (
        "gpt_neox",
        {
            "gpt_neox.layers.0.attention.bias": MASK.byte(),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.2.attention.rotary_emb.inv_freq": FREQUENCIES,
        },
    ),
    ("opt", {"model.decoder.version": torch.tensor([3.0])}),
]


@pytest.mark.parametrize(("family", "buffers"), AS_RELEASED, ids=[family for family, _ in AS_RELEASED])
def test_buffers_that_released_checkpoints_have(
    checkpoint: Checkpoints, family: str, buffers: dict[str, Tensor]
) -> None:
    plan = planned(checkpoint(family, add=buffers))
    assert names(plan, "outside") == set(buffers)
    assert plan.writers == planned(checkpoint(family)).writers


DEFAULTED: list[tuple[str, dict[str, Any], bool]] = [
    ("llama", {"attention_bias": False, "mlp_bias": False}, False),
    ("mistral", {}, False),
    ("qwen2", {}, False),
    ("qwen3", {"attention_bias": False}, False),
    ("phi3", {}, False),
    ("gemma2", {"attention_bias": False}, True),
    ("gemma3_text", {"attention_bias": False}, True),
    ("gpt2", {}, True),
    ("gpt_neox", {}, False),
    ("opt", {}, True),
]
SILENT = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "add_cross_attention", "enable_bias", "word_embed_proj_dim",
    "layer_norm_elementwise_affine", "do_layer_norm_before", "_remove_final_layer_norm",
)  # fmt: skip


@pytest.mark.parametrize(("family", "made", "tied"), DEFAULTED, ids=[family for family, _, _ in DEFAULTED])
def test_configs_that_leave_defaults_out(
    checkpoint: Checkpoints, family: str, made: dict[str, Any], tied: bool
) -> None:
    plan = planned(checkpoint(family, made, config=dict.fromkeys(SILENT)))
    assert plan.tied is tied
    assert plan.writers == planned(checkpoint(family, made)).writers


def test_gpt2_config_in_the_words_of_other_families(checkpoint: Checkpoints) -> None:
    config = {"n_embd": None, "n_layer": None, "hidden_size": H, "num_hidden_layers": 3}
    assert planned(checkpoint("gpt2", config=config)) == planned(checkpoint("gpt2"))


@pytest.mark.parametrize(("family", "head"), [("qwen3", "lm_head"), ("opt", "lm_head"), ("gpt_neox", "embed_out")])
def test_a_stored_copy_of_a_tied_head(checkpoint: Checkpoints, family: str, head: str) -> None:
    plan = planned(checkpoint(family, {"tied": True}, add={f"{head}.weight": torch.zeros(pico.VOCABULARY, H)}))
    assert plan.tied and plan.head_copy and plan.head == f"{head}.weight"
    (role,) = [role for role in plan.roles if role.role == "head"]
    assert role.name == plan.head and "copy of the tied embedding" in role.reason


def test_an_unknown_model_type(checkpoint: Checkpoints) -> None:
    refused(checkpoint("llama", config={"model_type": "rwkv"}), "rwkv", "supported: gemma2, ")
    refused(checkpoint("llama", config={"model_type": None}), "names no model_type")
    refused(checkpoint("llama", config={"model_type": ["llama"]}), "names no model_type")
    refused(checkpoint("llama", config={"model_type": "gemma3"}), "gemma3", "multimodal", "gemma3_text")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.extra_proj.weight",
        "foo.model.layers.1.mlp.down_proj.weight",
        "model.model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight.scale",
        "model.layers.01.mlp.down_proj.weight",
        "model.layers.1.1.mlp.down_proj.weight",
        "model.layers.*.mlp.down_proj.weight",
        "model.layers.{N}.mlp.down_proj.weight",
        "model.layers.١.mlp.down_proj.weight",
        "model.layers.-1.mlp.down_proj.weight",
        "layers.1.mlp.down_proj.weight",
        "model.mtp.eh_proj.weight",
        "mtp.embed.weight",
        "embed_tokens.lm_head.weight",
        "model.layers." + "9" * 5000 + ".mlp.down_proj.weight",
    ],
    ids=lambda name: name[:40],
)
def test_an_unknown_tensor(checkpoint: Checkpoints, name: str) -> None:
    refused(checkpoint("llama", add={name: torch.zeros(H, 3)}), name, "is not accounted for", "llama")


def test_a_second_embedding(checkpoint: Checkpoints) -> None:
    added = {"foo.model.embed_tokens.weight": torch.zeros(3, H)}
    refused(checkpoint("llama", add=added), "foo.model.embed_tokens.weight", " model.embed_tokens.weight")


def test_a_layer_beyond_the_config(checkpoint: Checkpoints) -> None:
    added = {"model.layers.3.mlp.down_proj.weight": torch.zeros(H, 72)}
    refused(checkpoint("llama", add=added), "model.layers.3.mlp.down_proj.weight", "beyond the 3 of config.json")
    refused(checkpoint("llama", config={"num_hidden_layers": 2}), "model.layers.2.", "beyond the 2 of config.json")


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_every_single_tensor_is_needed(checkpoint: Checkpoints, family: str) -> None:
    whole = open_checkpoint(checkpoint(family))
    (header,) = whole.shards
    for name in whole.tensors:
        left = {key: info for key, info in header.tensors.items() if key != name}
        with pytest.raises(ArchitectureError, match=r"is missing|no tensor") as caught:
            plan_architecture(replace(whole, shards=(replace(header, tensors=left),)))
        assert ".".join(name.split(".")[-2:]) in str(caught.value)


WRONG_SHAPES: list[tuple[str, str, tuple[int, ...], str]] = [
    ("llama", "model.layers.1.self_attn.o_proj.weight", (40, H), "along axis 0"),
    ("llama", "model.layers.1.mlp.up_proj.weight", (H, 72), "along axis 1"),
    ("llama", "model.embed_tokens.weight", (H, pico.VOCABULARY), "along axis 1"),
    ("llama", "model.layers.0.mlp.down_proj.bias", (47,), "along axis 0"),
    ("llama", "model.layers.0.mlp.down_proj.bias", (1, H), "1 dimensions"),
    ("llama", "model.layers.2.mlp.down_proj.weight", (2, H, 72), "2 dimensions"),
    ("gpt2", "transformer.h.1.mlp.c_proj.weight", (H, 72), "along axis 1"),
    ("gemma2", "model.layers.3.post_feedforward_layernorm.weight", (47,), "along axis 0"),
    ("opt", "model.decoder.embed_positions.weight", (H, 1026), "along axis 1"),
]


@pytest.mark.parametrize(("family", "name", "shape", "problem"), WRONG_SHAPES)
def test_a_wrong_shape(checkpoint: Checkpoints, family: str, name: str, shape: tuple[int, ...], problem: str) -> None:
    refused(checkpoint(family, add={name: torch.zeros(shape)}), name, str(list(shape)), problem)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_a_dtype_that_cannot_be_edited(checkpoint: Checkpoints, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    refused(checkpoint("mistral", add={name: torch.zeros(H, 72).to(dtype)}), name, "BF16", "unquantized")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_may_be_mixed(checkpoint: Checkpoints, dtype: torch.dtype) -> None:
    added = {"model.layers.1.mlp.down_proj.weight": torch.zeros(H, 72, dtype=dtype)}
    assert planned(checkpoint("mistral", add=added)).writers == planned(checkpoint("mistral")).writers


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, ["do_layer_norm_before is False", "normalises the stream"]),
        ("opt", {"word_embed_proj_dim": 32}, ["word_embed_proj_dim is 32", "project_in"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention is True", "cross-attention"]),
    ],
)
def test_configs_that_are_refused(
    checkpoint: Checkpoints, family: str, config: dict[str, Any], words: list[str]
) -> None:
    refused(checkpoint(family, config=config), family, *words)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"tie_word_embeddings": "yes"}),
        ("llama", {"attention_bias": 1}),
        ("llama", {"mlp_bias": "false"}),
        ("opt", {"enable_bias": [True]}),
        ("opt", {"do_layer_norm_before": "false"}),
    ],
)
def test_a_switch_that_is_neither_on_nor_off(checkpoint: Checkpoints, family: str, config: dict[str, Any]) -> None:
    ((switch, value),) = config.items()
    refused(checkpoint(family, config=config), f"{switch} = {value!r}", "must be true or false")


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**5, 2.0, True, "3", [3], {"n": 3}, None])
@pytest.mark.parametrize(("family", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_an_absurd_number_of_layers(checkpoint: Checkpoints, family: str, key: str, value: Any) -> None:
    refused(checkpoint(family, config={key: value}), f"no usable {key}", repr(value)[:5])


@pytest.mark.parametrize("value", [0, 10**12, "48", None])
def test_an_absurd_width(checkpoint: Checkpoints, value: Any) -> None:
    refused(checkpoint("llama", config={"hidden_size": value}), "no usable hidden_size")


def test_more_layers_than_there_are(checkpoint: Checkpoints) -> None:
    refused(checkpoint("llama", config={"num_hidden_layers": 10_000}), "model.layers.3.", "is missing")


def test_another_width(checkpoint: Checkpoints) -> None:
    refused(checkpoint("llama", config={"hidden_size": 47}), "model.", "the width of the stream, 47")


def test_weights_of_another_family(checkpoint: Checkpoints) -> None:
    refused(checkpoint("gpt2", config={"model_type": "llama"}), "no tensor embed_tokens.weight", "llama")
    refused(checkpoint("qwen3", config={"model_type": "llama"}), "llama")
    refused(checkpoint("llama", config={"model_type": "phi3"}), "phi3")
    refused(checkpoint("llama", config={"model_type": "gemma2"}), "gemma2")


def test_heads(checkpoint: Checkpoints) -> None:
    refused(checkpoint("llama", drop=["lm_head.weight"]), "lm_head.weight is missing", "tie_word_embeddings is false")
    second = {"lm_head.weight": torch.zeros(pico.VOCABULARY, H)}
    refused(checkpoint("gpt_neox", add=second), "two heads, embed_out.weight and lm_head.weight")
    narrow = {"lm_head.weight": torch.zeros(pico.VOCABULARY - 1, H)}
    refused(checkpoint("llama", add=narrow), "lm_head.weight", "[130, 48]", "[131, 48]")
    copy = {"lm_head.weight": torch.zeros(pico.VOCABULARY - 1, H)}
    refused(checkpoint("llama", {"tied": True}, add=copy), "lm_head.weight", "[130, 48]")
