"""Plans of whole checkpoints of every family, and a clear no to everything else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaForCausalLM

from abliterate.architecture.writer import Step, Writer
from abliterate.checkpoint.files import open_checkpoint
from tests import pico
from tests.architecture.planned import Checkpoints, H, kinds, names, planned, refused, role, writer

ALL = (*pico.FAMILIES, *pico.OTHERS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ALL)
def test_every_tensor_has_one_role(checkpoint: Checkpoints, family: str, tied: bool) -> None:
    folder = checkpoint(family, {"tied": tied})
    stored, plan = open_checkpoint(folder).tensors, planned(folder)
    assert [tensor.name for tensor in plan.roles] == list(stored)
    assert all(tensor.reason for tensor in plan.roles)
    assert names(plan, "writer") == {writer.tensor for writer in plan.writers}
    assert len({writer.tensor for writer in plan.writers}) == len(plan.writers)
    beside = {"cls.predictions.decoder.bias"} if family == "bert" else set()
    assert names(plan, "head") == (set() if tied else {plan.head} | beside)
    assert not names(plan, "unknown")
    assert all(name.startswith("cls.predictions.") for name in names(plan, "outside"))
    assert plan.model_type == family and plan.hidden_size == H and plan.tied is tied and not plan.head_copy
    assert not plan.probed and plan.inexact is None and plan.sometimes == ()
    config = json.loads((folder / "config.json").read_text())
    assert plan.num_layers == config.get("num_hidden_layers", config.get("n_layer")) == len(plan.runtime.layers)
    assert plan.runtime.class_name == config["architectures"][0]
    for each in plan.writers:
        assert stored[each.tensor].shape[each.axis] == H
        assert all(step.tensor is None or stored[step.tensor].shape == (H,) for step in (*each.gain, *each.skip))
    assert len(plan.boundaries) == (plan.num_layers + 1 if family in ("bert", "minimax") else 0)


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
        "olmo2": {"embedding": 1, "attention": 3, "mlp": 3},
        "bloom": {"embedding": 1, "attention": 3, "mlp": 3, "bias": 7},
        "bert": {"embedding": 2, "position": 1, "attention": 3, "mlp": 3, "bias": 13},
        "mixtral": {"embedding": 1, "attention": 3, "mlp": 12},
        "minimax": {"embedding": 1, "attention": 2, "mixer": 1, "mlp": 12},
        "deepseek_v3": {"embedding": 1, "attention": 3, "mlp": 11},
        "qwen3_next": {"embedding": 1, "attention": 1, "mixer": 3, "mlp": 20},
        "zamba": {"embedding": 1, "mixer": 3},
    }.items(),
)
def test_writers_are_counted(checkpoint: Checkpoints, family: str, count: dict[str, int]) -> None:
    assert kinds(planned(checkpoint(family))) == count


def test_writers_in_the_order_of_a_forward_pass(checkpoint: Checkpoints) -> None:
    """What is in one layer comes in the order of the file."""
    gemma = planned(checkpoint("gemma2", {"num_hidden_layers": 1})).writers
    after_attention = (Step("scale", "model.layers.0.post_attention_layernorm.weight", 1.0),)
    after_mlp = (Step("scale", "model.layers.0.post_feedforward_layernorm.weight", 1.0),)
    assert gemma[0] == Writer("model.embed_tokens.weight", "embedding", 1, None)
    assert set(gemma[1:]) == {
        Writer("model.layers.0.self_attn.o_proj.weight", "attention", 0, 0, after_attention),
        Writer("model.layers.0.self_attn.o_proj.bias", "bias", 0, 0, after_attention),
        Writer("model.layers.0.mlp.down_proj.weight", "mlp", 0, 0, after_mlp),
    }
    gpt2 = planned(checkpoint("gpt2", {"n_layer": 12})).writers
    assert [writer.tensor for writer in gpt2[:2]] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert [writer.layer for writer in gpt2[2:]] == [layer for layer in range(12) for _ in range(4)]
    assert {writer.axis for writer in gpt2 if writer.kind in ("attention", "mlp")} == {1}


def test_what_stands_between_a_writer_and_the_stream(checkpoint: Checkpoints) -> None:
    olmo = planned(checkpoint("olmo2"))
    assert writer(olmo, "model.layers.1.mlp.down_proj.weight").gain == (
        Step("scale", "model.layers.1.post_feedforward_layernorm.weight"),
    )
    bloom = planned(checkpoint("bloom"))
    norm = "transformer.word_embeddings_layernorm"
    assert bloom.embedding_writer == bloom.writers[0]
    assert bloom.writers[0].gain == (Step("scale", f"{norm}.weight"), Step("center"))
    assert writer(bloom, f"{norm}.bias") == Writer(f"{norm}.bias", "bias", 0, None)
    assert not any(each.gain for each in bloom.writers[1:])


def test_what_the_stream_passes_on_its_way(checkpoint: Checkpoints) -> None:
    """BERT norms the stream after each sublayer, so that what comes early is turned most."""
    plan, layer = planned(checkpoint("bert", {"num_hidden_layers": 2})), "bert.encoder.layer"

    def through(number: int, norm: str) -> tuple[Step, Step]:
        return Step("scale", f"{layer}.{number}.{norm}.LayerNorm.weight"), Step("center")

    last = through(1, "output")
    whole = (*last, *through(1, "attention.output"), *through(0, "output"), *through(0, "attention.output"))
    assert plan.boundaries == (whole, whole[:4], ())
    assert [len(path) for path in plan.boundaries] == [8, 4, 0]
    embedding = plan.embedding_writer
    assert embedding is not None and embedding.skip == whole
    assert embedding.gain == (Step("scale", "bert.embeddings.LayerNorm.weight"), Step("center"))
    assert writer(plan, f"{layer}.0.attention.output.dense.weight").skip == whole
    assert writer(plan, f"{layer}.0.attention.output.LayerNorm.bias").skip == whole[:6]
    assert writer(plan, f"{layer}.0.output.dense.bias").skip == whole[:6]
    assert writer(plan, f"{layer}.0.output.LayerNorm.bias").skip == whole[:4]
    assert writer(plan, f"{layer}.1.output.dense.weight").skip == last
    assert writer(plan, f"{layer}.1.output.LayerNorm.bias").skip == ()


def test_a_gain_on_the_skip_path_before_each_sublayer(checkpoint: Checkpoints) -> None:
    plan = planned(checkpoint("minimax", {"num_hidden_layers": 2}))
    first, second = (
        (
            Step("scale", f"model.layers.{i}.post_attention_layernorm.weight"),
            Step("scale", f"model.layers.{i}.input_layernorm.weight"),
        )
        for i in (0, 1)
    )
    assert plan.boundaries == ((*second, *first), second, ())
    assert writer(plan, "model.layers.0.self_attn.o_proj.weight").skip == (*second, first[0])
    assert writer(plan, "model.layers.1.self_attn.out_proj.weight").skip == (second[0],)
    for expert in range(4):
        assert writer(plan, f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight").skip == second
        assert writer(plan, f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight").skip == ()


@pytest.mark.parametrize("family", ["gemma2", "bloom", "bert", "minimax"])
def test_the_run_time_names_of_what_the_plan_names(checkpoint: Checkpoints, family: str) -> None:
    plan, parameters = planned(checkpoint(family)), dict(pico.build(family).named_parameters())
    steps = {step.tensor for each in plan.writers for step in (*each.gain, *each.skip) if step.tensor}
    assert set(plan.runtime.writers) == {each.tensor for each in plan.writers}
    assert set(plan.runtime.steps) == steps and steps
    assert {*plan.runtime.writers.values(), *plan.runtime.steps.values()} <= set(parameters)


def test_the_run_time_names_of_experts(checkpoint: Checkpoints) -> None:
    plan = planned(checkpoint("mixtral"))
    assert plan.runtime.writers["model.layers.2.block_sparse_moe.experts.3.w2.weight"] == (
        "model.layers.2.mlp.experts.down_proj"
    )


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
    biases = [each for each in planned(checkpoint(family, made)).writers if each.kind == "bias"]
    if family == "opt":  # that switch leaves the biases of norms alone
        assert not any(each.layer is not None for each in biases)
    assert len(biases) == count
    for switch, on in made.items():
        problem = ["is not accounted for", ".bias "] if on else ["is missing", ".bias "]
        refused(checkpoint(family, made, config={switch: not on}), *problem)


def test_opt_without_what_its_config_leaves_out(checkpoint: Checkpoints) -> None:
    bare = planned(checkpoint("opt", {"layer_norm_elementwise_affine": False}))
    assert not names(bare, "norm")
    unnormed = planned(checkpoint("opt", {"_remove_final_layer_norm": True}))
    assert names(unnormed, "norm")
    assert not any(name.startswith("model.decoder.final") for name in names(unnormed, "norm"))


def test_opt_that_norms_the_stream(checkpoint: Checkpoints) -> None:
    """OPT-350m: its norms come after the sublayers, and it has none at the end."""
    plan = planned(checkpoint("opt", {"do_layer_norm_before": False}))
    assert plan.family == "opt_350m" and len(plan.boundaries) == 4
    assert [len(path) for path in plan.boundaries] == [12, 8, 4, 0]
    assert kinds(plan)["bias"] == 12
    assert writer(plan, "model.decoder.layers.2.self_attn_layer_norm.bias").skip == (
        Step("scale", "model.decoder.layers.2.final_layer_norm.weight"),
        Step("center"),
    )
    norms = "model.decoder.final_layer_norm.bias"
    refused(checkpoint("opt", config={"do_layer_norm_before": False}), norms, "is not accounted for")


def test_opt_with_a_narrow_embedding(checkpoint: Checkpoints) -> None:
    """What widens it writes in its place, and the head, narrow as well, takes no edit."""
    plan = planned(checkpoint("opt", {"word_embed_proj_dim": 32}))
    assert plan.embedding == "model.decoder.embed_tokens.weight" and plan.embedding_writer is None
    assert (
        role(plan, plan.embedding).role == "inside" and "narrower than the stream" in role(plan, plan.embedding).reason
    )
    assert writer(plan, "model.decoder.project_in.weight") == Writer(
        "model.decoder.project_in.weight", "embedding", 0, None
    )
    assert role(plan, "model.decoder.project_out.weight").role == "reader"
    assert plan.tied and not plan.shares_edit
    refused(checkpoint("opt", config={"word_embed_proj_dim": 32}), "embed_tokens.weight", "[131, 48]", "[131, 32]")


def test_layers_that_only_run_for_images(tmp_path: Path) -> None:
    config = MllamaTextConfig(
        hidden_size=H, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=pico.VOCABULARY, cross_attention_layers=[1], tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    MllamaForCausalLM(config).save_pretrained(tmp_path)
    plan = planned(tmp_path)
    assert plan.sometimes == (1,) and plan.num_layers == 3
    assert writer(plan, "model.layers.1.cross_attn.o_proj.weight").layer == 1
    assert role(plan, "model.layers.1.cross_attn_attn_gate").role == "inside"


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
    assert {role(plan, name).role for name in buffers} == {"inside"}
    assert all("not used by transformers" in role(plan, name).reason for name in buffers)
    assert plan.writers == planned(checkpoint(family)).writers


def test_a_mask_as_large_as_the_stream_is_wide(checkpoint: Checkpoints) -> None:
    """GPT-2's is [1, 1, 1024, 1024], and GPT-2 medium's stream 1024 wide."""
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, H, H)}
    assert role(planned(checkpoint("gpt2", add=mask)), "transformer.h.0.attn.bias").role == "inside"


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


def test_a_config_that_names_no_class(checkpoint: Checkpoints) -> None:
    usual = planned(checkpoint("llama"))
    for architectures in (None, [], ["OfMyOwn"], "LlamaForCausalLM", [3]):
        assert planned(checkpoint("llama", config={"architectures": architectures})) == usual


def test_cross_attention_writes_where_it_is(checkpoint: Checkpoints) -> None:
    plan = planned(checkpoint("gpt2", {"add_cross_attention": True}))
    assert kinds(plan)["attention"] == 6 and writer(plan, "transformer.h.1.crossattention.c_proj.weight").axis == 1
    refused(checkpoint("gpt2", config={"add_cross_attention": True}), "gpt2", "crossattention", "is missing")


def test_an_unknown_model_type(checkpoint: Checkpoints) -> None:
    refused(checkpoint("llama", config={"model_type": "strange"}), "strange is not known to transformers", "newer")
    refused(checkpoint("llama", config={"model_type": "t5"}), "no model that generates text for model type t5")
    refused(checkpoint("llama", config={"model_type": "rwkv"}), "rwkv is not supported: what its channel mix writes")
    for nothing in (None, ["llama"], 3):
        refused(checkpoint("llama", config={"model_type": nothing}), "names no model_type")


def test_a_model_type_that_brings_its_own_code(checkpoint: Checkpoints) -> None:
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "configuration_strange.StrangeConfig"}}
    refused(checkpoint("llama", config=config), "strange", "its own code can be run with --trust-remote-code")


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
    refused(checkpoint(family, config=config), f"cannot build a {family} from this config.json", *config)


@pytest.mark.parametrize("value", [2.0, True, "3", [3], {"n": 3}])
@pytest.mark.parametrize(("family", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_a_number_of_layers_that_is_none(checkpoint: Checkpoints, family: str, key: str, value: Any) -> None:
    refused(checkpoint(family, config={key: value}), f"cannot build a {family} from this config.json", key)


@pytest.mark.parametrize("value", [0, -1, 1, 2])
@pytest.mark.parametrize(("family", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_fewer_layers_than_there_are(checkpoint: Checkpoints, family: str, key: str, value: int) -> None:
    refused(checkpoint(family, config={key: value}), f".{max(value, 0)}.", "is not accounted for")


@pytest.mark.parametrize("value", [4, 100, None])
@pytest.mark.parametrize(("family", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_more_layers_than_there_are(checkpoint: Checkpoints, family: str, key: str, value: int | None) -> None:
    refused(checkpoint(family, config={key: value}), ".3.", "is missing")


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("family", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_an_absurd_number_of_layers(checkpoint: Checkpoints, family: str, key: str) -> None:
    """Said at once: a config.json can be anything."""
    refused(checkpoint(family, config={key: 10**9}), family)


@pytest.mark.parametrize("value", [0, 10**12, "48", None])
def test_an_absurd_width(checkpoint: Checkpoints, value: Any) -> None:
    problem = "hidden_size" if isinstance(value, str) else "[131, 48]"
    refused(checkpoint("llama", config={"hidden_size": value}), "llama", problem)


def test_another_width(checkpoint: Checkpoints) -> None:
    refused(checkpoint("llama", config={"hidden_size": 96}), "lm_head.weight", "[131, 48]", "[131, 96]")
    refused(checkpoint("llama", config={"hidden_size": 47}), "cannot build a llama", "validate")


def test_weights_of_another_family(checkpoint: Checkpoints) -> None:
    def of(model_type: str, class_name: str) -> dict[str, Any]:
        return {"model_type": model_type, "architectures": [class_name]}

    llama, plain = of("llama", "LlamaForCausalLM"), {"attention_bias": False, "mlp_bias": False}
    refused(checkpoint("gpt2", config=llama), "no tensor embed_tokens.weight beside layers", "llama")
    refused(checkpoint("gemma2", config=llama), "post_feedforward_layernorm.weight [48] is not accounted for", "llama")
    refused(checkpoint("phi3", config=llama), "gate_up_proj.weight [144, 48] is not accounted for", "llama")
    gemma = of("gemma2", "Gemma2ForCausalLM")
    refused(checkpoint("llama", plain, config=gemma), "feedforward_layernorm.weight is missing", "gemma2")
    phi = of("phi3", "Phi3ForCausalLM")
    refused(checkpoint("llama", plain, config=phi), ".weight [72, 48] is not accounted for", "phi3")
    olmo = of("olmo2", "Olmo2ForCausalLM")
    refused(checkpoint("gemma2", {"attention_bias": False}, config=olmo), "is not accounted for", "olmo2")


def test_what_another_family_has_besides_is_said_to_be_unused(checkpoint: Checkpoints) -> None:
    """Qwen 3 is Llama with norms of the attention heads, which are not as wide as the stream."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    plan = planned(checkpoint("qwen3", config=config))
    norm = role(plan, "model.layers.1.self_attn.q_norm.weight")
    assert norm.role == "inside" and "not used by transformers" in norm.reason


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3", "phi3", "gpt2"])
def test_a_class_that_is_not_of_the_model_type(checkpoint: Checkpoints, model_type: str) -> None:
    """`architectures` says Llama: another type's entry must not be taken for it."""
    refused(checkpoint("llama", config={"model_type": model_type}), model_type)


def test_weights_that_the_head_s_class_does_not_use(checkpoint: Checkpoints) -> None:
    for name in ("LlamaForSequenceClassification", "LlamaModel"):
        refused(checkpoint("llama", config={"architectures": [name]}), "lm_head.weight", "is not accounted for")
    bare = checkpoint("llama", config={"architectures": ["LlamaModel"]}, drop=["lm_head.weight"])
    refused(bare, "LlamaModel has no output head: it generates no text")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_a_dtype_that_cannot_be_edited(checkpoint: Checkpoints, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    refused(checkpoint("mistral", add={name: torch.zeros(H, 72).to(dtype)}), name, "BF16", "unquantized")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_may_be_mixed(checkpoint: Checkpoints, dtype: torch.dtype) -> None:
    added = {"model.layers.1.mlp.down_proj.weight": torch.zeros(H, 72, dtype=dtype)}
    plan = planned(checkpoint("mistral", add=added))
    assert set(plan.writers) == set(planned(checkpoint("mistral")).writers) and len(plan.writers) == 7
