"""Where the decoder is in a checkpoint: under any prefix, beside other towers, in more than one list of layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HrmTextConfig, HrmTextForCausalLM

from abliterate.architecture.account import Account
from abliterate.architecture.blueprint import read_blueprint
from abliterate.architecture.entry import Entry, find_entry
from abliterate.architecture.plan import plan_architecture
from abliterate.architecture.table import read_family
from abliterate.architecture.writer import Plan, Step
from abliterate.checkpoint.files import open_checkpoint
from abliterate.errors import ArchitectureError
from tests import pico
from tests.architecture.planned import Checkpoints, H, names, planned, refused, role, save_llava, writer


def account(folder: Path) -> Account:
    checkpoint = open_checkpoint(folder)
    blueprint = read_blueprint(checkpoint.folder, checkpoint.config)
    entry = find_entry(checkpoint.config, blueprint)
    assert entry is not None
    return Account(checkpoint.tensors, entry, blueprint, "pico")


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("gpt2", "transformer.", ""),
        ("opt", "model.", ""),
        ("llama", "model.", ""),
        ("llama", "model.", "model.model."),
        ("gpt_neox", "gpt_neox.", ""),
        ("bloom", "transformer.", ""),
        ("bert", "bert.", ""),
        ("mixtral", "model.", ""),
    ],
)
def test_other_prefixes(checkpoint: Checkpoints, family: str, old: str, new: str) -> None:
    def renamed(name: str) -> str:
        return new + name.removeprefix(old) if name.startswith(old) else name

    usual = planned(checkpoint(family))
    other = planned(checkpoint(family, rename=renamed))
    assert {w.tensor for w in other.writers} == {renamed(w.tensor) for w in usual.writers}
    assert sorted(tensor.role for tensor in other.roles) == sorted(tensor.role for tensor in usual.roles)
    assert other.embedding == renamed(usual.embedding) and other.head == usual.head
    assert other.runtime.layers == usual.runtime.layers
    assert {renamed(name): place for name, place in usual.runtime.writers.items()} == other.runtime.writers
    assert {renamed(name): place for name, place in usual.runtime.steps.items()} == other.runtime.steps


@pytest.mark.parametrize(
    ("family", "old", "new"), [("gpt_neox", "gpt_neox.", "model."), ("gpt2", "transformer.", "foo.")]
)
def test_a_prefix_that_transformers_does_not_read(checkpoint: Checkpoints, family: str, old: str, new: str) -> None:
    folder = checkpoint(family, rename=lambda name: name.replace(old, new))
    refused(folder, new, family, "is not accounted for")


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("language_model.", "lm_head.weight"),
    ],
)
def test_a_text_tower_beside_another(tmp_path: Path, prefix: str, head: str) -> None:
    def renamed(name: str) -> str:
        return name.replace("language_model.lm_head.weight", head).replace("language_model.model.", prefix)

    folder = pico.rewrite(save_llava(tmp_path), rename=renamed)
    assert account(folder).prefix == prefix
    plan = planned(folder)
    assert plan.family == "llama" and plan.model_type == "llava" and plan.head == head
    assert {w.tensor for w in plan.writers} == {
        f"{prefix}embed_tokens.weight",
        *(f"{prefix}layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")),
        "multi_modal_projector.linear_2.weight",
        "multi_modal_projector.linear_2.bias",
    }
    assert plan.runtime.layers == ("model.language_model.layers.0", "model.language_model.layers.1")
    assert role(plan, "multi_modal_projector.linear_1.weight").role == "outside"
    assert all(name.startswith(("vision_tower", "multi_modal")) for name in names(plan, "outside"))
    assert not names(plan, "unknown")


def test_a_text_tower_where_transformers_does_not_look(tmp_path: Path) -> None:
    folder = pico.rewrite(save_llava(tmp_path), rename=lambda name: name.replace("language_model.model", "text.inner"))
    refused(folder, "text.inner.embed_tokens.weight", "is not accounted for", "llava")


def test_an_embedding_that_is_not_beside_layers(checkpoint: Checkpoints) -> None:
    llama = "llama, but the weights have"
    refused(checkpoint("gpt2", config={"architectures": None, "model_type": "llama"}), f"{llama} no tensor")
    apart = checkpoint("llama", rename=lambda name: name.replace("model.embed", "model.x.embed"))
    refused(apart, f"{llama} model.x.embed_tokens.weight for embed_tokens.weight beside layers")
    no_layers = [name for name in open_checkpoint(checkpoint("llama")).tensors if ".layers." in name]
    refused(checkpoint("llama", drop=no_layers), llama, "do not belong together")


def test_of_two_decoders_the_one_that_transformers_reads(checkpoint: Checkpoints) -> None:
    """The other is not accounted for, but is not taken for the first."""
    draft = {"draft.embed_tokens.weight": torch.zeros(3, H), "draft.layers.0.mlp.down_proj.weight": torch.zeros(H, 3)}
    folder = checkpoint("llama", add=draft)
    assert account(folder).embedding == "model.embed_tokens.weight" and account(folder).prefix == "model."
    refused(folder, "draft.", "is not accounted for")


def test_two_lists_of_layers(tmp_path: Path) -> None:
    config = HrmTextConfig(
        hidden_size=H, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=pico.VOCABULARY, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    HrmTextForCausalLM(config).save_pretrained(tmp_path)
    low, high = account(tmp_path).counts
    plan = planned(tmp_path)
    assert plan.num_layers == low + high == len(plan.runtime.layers)
    found = {w.tensor: w.layer for w in plan.writers}
    assert found["model.L_module.layers.1.mlp.down_proj.weight"] == 1
    assert found["model.H_module.layers.0.mlp.down_proj.weight"] == low
    numbers = [w.layer for w in plan.writers if w.layer is not None]
    assert numbers == sorted(numbers)
    assert writer(plan, "model.z_L_init").kind == "bias"


def test_matches_say_where_a_tensor_is(checkpoint: Checkpoints) -> None:
    found = {match.info.name: match for match in account(checkpoint("deepseek_v3")).matches()}
    expert = found["model.layers.2.mlp.experts.3.down_proj.weight"]
    assert (expert.scope, expert.layer, expert.list, expert.ahead, expert.head) == (
        "model.layers.2.",
        2,
        0,
        False,
        False,
    )
    assert expert.writes and expert.place.converted
    assert expert.place.parameters == ("model.layers.2.mlp.experts.down_proj",)
    head = found["lm_head.weight"]
    assert head.head and not head.writes and head.rule is None
    norm = found["model.norm.weight"]
    assert norm.scope == "model." and norm.layer is None and norm.rule is not None and norm.rule.role == "norm"


STEM = [{"writes": {"embed_tokens": {"kind": "embedding", "axis": 1}}, "norms": ["norm"]}]
LAYER = [
    {
        "writes": {"{self_attn.o_proj,mlp.down_proj}": "mlp"},
        "reads": ["self_attn.{q,k,v}_proj", "mlp.{gate,up}_proj"],
        "norms": ["{input,post_attention}_layernorm"],
    }
]


def with_entry(folder: Path, **entry: Any) -> Plan:
    """The plan of a Llama by an entry of the test's own."""
    family = read_family("own", {"types": ["llama"], "stem": STEM, "layer": LAYER, **entry}, {})
    return plan_architecture(open_checkpoint(folder), entry=Entry(family, family.outside))


def test_what_predicts_further_tokens_is_looked_for_in_every_part(checkpoint: Checkpoints) -> None:
    """Rules of the main layers come first, then those of such layers alone, then those of what is beside them."""
    added = {
        name: torch.zeros(H, 3 * H)
        for name in (
            "mtp.fc.weight",
            "mtp.layers.0.block.mlp.down_proj.weight",
            "mtp.layers.0.mlp.down_proj.weight",
            "mtp.layers.12.eh_proj.weight",
            "mtp.layers.0.fc.weight",
            "deep.below.mtp.layers.1.block.eh_proj.weight",
        )
    }
    entry = {
        "mtp": {"prefix": "mtp", "layers": "mtp.layers", "block": "block", "stem": [{"writes": {"fc": "projector"}}]},
        "beyond": [{"writes": {"eh_proj": "projector"}}],
    }
    plan = with_entry(checkpoint("llama", add=added), **entry)
    assert {w.tensor for w in plan.writers[-len(added) :]} == set(added)
    assert all(w.layer is None and w.gain == w.skip == () for w in plan.writers[-len(added) :])
    for stray in (
        "mtp.mlp.down_proj.weight",
        "mtp.eh_proj.weight",
        "mtp.layers.x.fc.weight",
        "mtp.layers.0.b.fc.weight",
    ):
        with pytest.raises(ArchitectureError, match="is not accounted for"):
            with_entry(checkpoint("llama", add={stray: torch.zeros(H, 3)}), **entry)


def test_a_gain_there_is_looked_for_in_the_same_layer(checkpoint: Checkpoints) -> None:
    added = {
        "mtp.layers.0.block.mlp.down_proj.weight": torch.zeros(H, 3),
        "mtp.layers.0.block.post_attention_layernorm.weight": torch.zeros(H),
        "mtp.layers.1.block.mlp.down_proj.weight": torch.zeros(H, 3),
    }
    mtp = {"prefix": "", "layers": "mtp.layers", "block": "block"}
    gains = {"mlp.down_proj": "post_attention_layernorm"}
    plan = with_entry(checkpoint("llama", add=added), mtp=mtp, gains=gains)
    step = Step("scale", "mtp.layers.0.block.post_attention_layernorm.weight")
    assert writer(plan, "mtp.layers.0.block.mlp.down_proj.weight").gain == (step,)
    assert writer(plan, "mtp.layers.1.block.mlp.down_proj.weight").gain == (), "it has none"
    assert writer(plan, "model.layers.1.mlp.down_proj.weight").gain == (
        Step("scale", "model.layers.1.post_attention_layernorm.weight"),
    )


def test_a_skip_path_is_that_of_the_main_layers(checkpoint: Checkpoints) -> None:
    """What comes after the last layer passes nothing; what comes before the first passes everything."""
    names_ahead = {"mlp.down_proj": (H, 3), "eh_proj": (H, 2 * H)}
    added = {f"model.layers.3.{name}.weight": torch.zeros(shape) for name, shape in names_ahead.items()}
    skip = ["input_layernorm", "self_attn.o_proj", "mlp.down_proj"]
    beyond = [{"writes": {"eh_proj": "projector"}}]
    plan = with_entry(checkpoint("llama", add=added), skip=skip, beyond=beyond)
    assert writer(plan, "model.layers.3.mlp.down_proj.weight").skip == ()
    assert len(writer(plan, "model.layers.0.mlp.down_proj.weight").skip) == 2
    assert plan.writers[0].skip == plan.boundaries[0] and len(plan.boundaries[0]) == 3


def test_what_writes_from_within_another_tower(tmp_path: Path) -> None:
    """A writer is found by any end of its name, and before the tower that it is in."""
    folder = save_llava(tmp_path)
    inner = read_family("inner", {"types": ["llama"], "stem": STEM, "layer": LAYER}, {})
    outer = {
        "types": ["llava"],
        "writes": {"linear_2": "projector"},
        "outside": ["multi_modal_projector", "vision_tower"],
    }
    rules = read_family("outer", outer, {}).outside
    plan = plan_architecture(open_checkpoint(folder), entry=Entry(inner, rules))
    assert writer(plan, "multi_modal_projector.linear_2.weight").layer is None
    assert writer(plan, "multi_modal_projector.linear_2.bias").kind == "bias"
    assert role(plan, "multi_modal_projector.linear_1.weight").role == "outside"
