"""A checkpoint fills transformers' model of its config, tensor by tensor, or is refused."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from abliterate.architecture.plan import plan_architecture
from abliterate.checkpoint.files import open_checkpoint
from abliterate.errors import ArchitectureError
from tests import pico
from tests.architecture.planned import Checkpoints, H, names, planned, refused, role, save_llava, stored, weight, writer


@pytest.mark.parametrize("family", [*pico.FAMILIES, *pico.OTHERS])
def test_every_single_tensor_is_needed(checkpoint: Checkpoints, family: str) -> None:
    whole = open_checkpoint(checkpoint(family))
    (header,) = whole.shards
    for name in whole.tensors:
        left = {key: info for key, info in header.tensors.items() if key != name}
        with pytest.raises(ArchitectureError, match=r"is missing|no tensor|is stored 3 times") as caught:
            plan_architecture(replace(whole, shards=(replace(header, tensors=left),)))
        assert told_as(name) in str(caught.value)


def told_as(name: str) -> str:
    """The end of its name; experts are counted, and a head has the name that transformers gives it."""
    if ".experts." in name:
        return re.sub(r".*experts\.\d", "experts.*", name)
    return "lm_head.weight" if name == "embed_out.weight" else ".".join(name.split(".")[-2:])


UNKNOWN = [
    "model.layers.1.mlp.extra_proj.weight",
    "foo.model.layers.1.mlp.down_proj.weight",
    "model.layers.1.mlp.down_proj.weight.scale",
    "model.layers.01.mlp.down_proj.weight",
    "model.layers.1.1.mlp.down_proj.weight",
    "model.layers.*.mlp.down_proj.weight",
    "model.layers.{N}.mlp.down_proj.weight",
    "model.layers.١.mlp.down_proj.weight",
    "model.layers.-1.mlp.down_proj.weight",
    "model.layers.3.mlp.down_proj.weight",
    "model.layers.weight",
    "model.mtp.eh_proj.weight",
    "model.stray",
    "stray",
    "mtp.embed.weight",
    "embed_tokens.lm_head.weight",
    "model.layers." + "9" * 5000 + ".mlp.down_proj.weight",
]


@pytest.mark.parametrize("shape", [(H,), (H, 3), (3, H), (2, H, 3), (2, 3, 1, H)], ids=str)
@pytest.mark.parametrize("name", UNKNOWN, ids=lambda name: name[:40])
def test_an_unknown_tensor_as_wide_as_the_stream(checkpoint: Checkpoints, name: str, shape: tuple[int, ...]) -> None:
    shown = f"{name[-40:]} {list(shape)}"  # of a name without end, the middle is left out
    refused(checkpoint("llama", add={name: torch.zeros(shape)}), shown, "is not accounted", "llama")


@pytest.mark.parametrize("name", UNKNOWN, ids=lambda name: name[:40])
def test_an_unknown_tensor_nowhere_as_wide_is_listed(checkpoint: Checkpoints, name: str) -> None:
    plan = planned(checkpoint("llama", add={name: torch.zeros(H - 1, 3)}))
    assert names(plan, "unknown") == {name}
    assert "nothing in it is as wide as the stream" in role(plan, name).reason
    assert plan.writers == planned(checkpoint("llama")).writers


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.down_proj.weight", "model.model.layers.1.mlp.down_proj.weight", "embed_tokens.weight"]
)
def test_a_second_tensor_for_one_parameter(checkpoint: Checkpoints, name: str) -> None:
    """Transformers reads either name; which one wins is not for us to say."""
    first = stored(checkpoint("llama"))["model." + name.removeprefix("model.model.")]
    refused(checkpoint("llama", add={name: first.clone()}), name, "is not accounted for")
    refused(checkpoint("llama", add={name: torch.zeros(5, 3)}), name, "[5, 3]", str(list(first.shape)))


def test_a_second_embedding(checkpoint: Checkpoints) -> None:
    added = {"foo.model.embed_tokens.weight": torch.zeros(3, H)}
    refused(checkpoint("llama", add=added), "foo.model.embed_tokens.weight", "is not accounted for")


def test_a_layer_beyond_the_config(checkpoint: Checkpoints) -> None:
    added = {"model.layers.3.mlp.down_proj.weight": torch.zeros(H, 72)}
    refused(checkpoint("llama", add=added), "model.layers.3.mlp.down_proj.weight", "is not accounted for")
    refused(checkpoint("llama", config={"num_hidden_layers": 2}), "model.layers.2.", "is not accounted for")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("model.layers.1.self_attn.q_proj.bias", "reader"),
        ("model.layers.1.mlp.gate.weight", "unknown"),
        ("model.layers.1.self_attn.q_norm.weight", "inside"),
    ],
)
def test_what_the_table_knows_but_the_model_does_not_have(checkpoint: Checkpoints, name: str, known: str) -> None:
    """As wide as the stream it may write, whatever its name says, but for what works within a sublayer."""
    made = {"attention_bias": False, "mlp_bias": False}
    assert role(planned(checkpoint("llama", made, add={name: torch.zeros(40)})), name).role == known
    wide = checkpoint("llama", made, add={name: torch.zeros(H)})
    if known == "inside":
        assert role(planned(wide), name).role == "inside"
    else:
        refused(wide, name, "is not accounted for")


def test_what_is_beside_the_text_decoder_may_be_of_any_width(tmp_path: Path) -> None:
    added = {"vision_tower.extra.weight": torch.zeros(H, H), "multi_modal_projector.norm.weight": torch.zeros(H)}
    plan = planned(pico.rewrite(save_llava(tmp_path), add=added))
    assert set(added) <= names(plan, "outside")
    stray = {"audio_tower.extra.weight": torch.zeros(H, H)}
    refused(pico.rewrite(tmp_path, add=stray), "audio_tower.extra.weight", "is not accounted for", "llava")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.self_attn.o_proj.bias"),
        ("llama", "model.layers.1.self_attn.q_proj.bias"),
        ("gpt2", "transformer.h.2.mlp.c_proj.bias"),
        ("bert", "bert.encoder.layer.0.output.LayerNorm.bias"),
    ],
)
def test_a_dropped_bias(checkpoint: Checkpoints, family: str, name: str) -> None:
    refused(checkpoint(family, drop=[name]), f"tensor {name} is missing", family)


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("llama", "mlp.down_proj", "mlp.c_proj"),
        ("llama", "1.mlp.up_proj", "1.mlp.up"),
        ("mixtral", "o_proj", "out_proj"),
        ("mixtral", "experts.2.w2", "experts.2.down"),
        ("gpt2", "h.1.attn.c_proj", "h.1.attn.out"),
    ],
)
def test_a_renamed_tensor(checkpoint: Checkpoints, family: str, old: str, new: str) -> None:
    refused(checkpoint(family, rename=lambda name: name.replace(old, new)), new, "is not accounted for", family)


WRONG_SHAPES: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = [
    ("llama", "model.layers.1.self_attn.o_proj.weight", (40, H), (H, 40)),
    ("llama", "model.layers.1.mlp.up_proj.weight", (H, 72), (72, H)),
    ("llama", "model.embed_tokens.weight", (H, pico.VOCABULARY), (pico.VOCABULARY, H)),
    ("llama", "model.layers.0.mlp.down_proj.bias", (47,), (H,)),
    ("llama", "model.layers.0.mlp.down_proj.bias", (1, H), (H,)),
    ("llama", "model.layers.2.mlp.down_proj.weight", (2, H, 72), (H, 72)),
    ("llama", "model.layers.2.mlp.down_proj.weight", (H, 71), (H, 72)),
    ("gpt2", "transformer.h.1.mlp.c_proj.weight", (H, 72), (72, H)),
    ("gemma2", "model.layers.3.post_feedforward_layernorm.weight", (47,), (H,)),
    ("opt", "model.decoder.embed_positions.weight", (H, 1026), (1026, H)),
    ("qwen3_next", "model.layers.0.linear_attn.out_proj.weight", (20, H), (H, 20)),
]


@pytest.mark.parametrize(("family", "name", "shape", "right"), WRONG_SHAPES)
def test_a_wrong_shape(
    checkpoint: Checkpoints, family: str, name: str, shape: tuple[int, ...], right: tuple[int, ...]
) -> None:
    problem = f"tensor {name} has shape {list(shape)}; {family} with this config.json has it as {list(right)}"
    refused(checkpoint(family, add={name: torch.zeros(shape)}), problem)


def test_a_square_matrix_cannot_be_seen_to_lie_on_its_side(checkpoint: Checkpoints) -> None:
    """Only the layout that the table says counts: nothing in a file tells a square matrix from its transpose."""
    name = "model.layers.1.self_attn.o_proj.weight"
    made = {"head_dim": 12}
    before = stored(checkpoint("llama", made))[name]
    assert before.shape == (H, H)
    plan = planned(checkpoint("llama", made, add={name: before.T.contiguous()}))
    assert writer(plan, name).axis == 0 and plan == planned(checkpoint("llama", made))
    assert writer(planned(checkpoint("gpt2")), "transformer.h.1.attn.c_proj.weight").axis == 1


EXPERTS = "model.layers.1.block_sparse_moe.experts"


def fused(checkpoint: Checkpoints) -> dict[str, Tensor]:
    """Mixtral's experts as transformers holds them, under the name that they have on disk."""
    tensors: dict[str, Tensor] = stored(checkpoint("mixtral"))
    made: dict[str, Tensor] = {}
    for layer in range(3):
        place = f"model.layers.{layer}.block_sparse_moe.experts"
        each = {k: [tensors[f"{place}.{expert}.{k}.weight"] for expert in range(4)] for k in ("w1", "w2", "w3")}
        gate_up = [torch.cat(pair) for pair in zip(each["w1"], each["w3"], strict=True)]
        made |= {f"{place}.gate_up_proj": torch.stack(gate_up), f"{place}.down_proj": torch.stack(each["w2"])}
    return made


def experts_of(checkpoint: Checkpoints, gone: Callable[[str], bool]) -> list[str]:
    return [name for name in stored(checkpoint("mixtral")) if ".experts." in name and gone(name)]


def test_experts_in_one_tensor(checkpoint: Checkpoints) -> None:
    drop = experts_of(checkpoint, lambda _: True)
    whole = fused(checkpoint)
    plan = planned(checkpoint("mixtral", drop=drop, add=whole))
    assert [each.tensor for each in plan.writers if each.kind == "mlp"] == [n for n in whole if n.endswith("down_proj")]
    assert {each.axis for each in plan.writers if each.kind == "mlp"} == {1}
    down = f"{EXPERTS}.down_proj"
    for wrong in (whole[down].transpose(1, 2).contiguous(), whole[down][:3].contiguous()):
        changed = checkpoint("mixtral", drop=drop, add=whole | {down: wrong})
        refused(changed, down, str(list(wrong.shape)), "[4, 48, 72]")
    refused(checkpoint("mixtral", drop=[*drop, down], add={n: t for n, t in whole.items() if n != down}), "is missing")


@pytest.mark.parametrize("left", [1, 2, 3])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_missing_expert(checkpoint: Checkpoints, left: int, everywhere: bool) -> None:
    def gone(name: str) -> bool:
        return (everywhere or name.startswith(EXPERTS)) and int(name.split(".experts.")[1][0]) >= left

    refused(checkpoint("mixtral", drop=experts_of(checkpoint, gone)), "experts", "incomplete")


@pytest.mark.parametrize("part", ["w1", "w2", "w3"])
def test_a_part_of_an_expert_that_is_missing(checkpoint: Checkpoints, part: str) -> None:
    one = checkpoint("mixtral", drop=[f"{EXPERTS}.2.{part}.weight"])
    refused(one, f"experts.*.{part}.weight is stored 3 times", "stacks 4", "incomplete")


@pytest.mark.parametrize("part", ["w1", "w2", "w3"])
def test_a_part_that_no_expert_of_a_layer_has(checkpoint: Checkpoints, part: str) -> None:
    """Gate and up are stored apart and loaded as one: half of that is not enough."""
    gone = experts_of(checkpoint, lambda name: name.startswith(EXPERTS) and f".{part}." in name)
    assert len(gone) == 4
    refused(checkpoint("mixtral", drop=gone), "experts")


def test_an_expert_too_many(checkpoint: Checkpoints) -> None:
    shapes = {"w1": (72, H), "w2": (H, 72), "w3": (72, H)}
    added = {f"{EXPERTS}.4.{part}.weight": torch.zeros(shape) for part, shape in shapes.items()}
    refused(checkpoint("mixtral", add=added), "is stored 5 times", "stacks 4")


@pytest.mark.parametrize(
    ("part", "shape"),
    [("w2", (72, H)), ("w2", (H, 71)), ("w2", (H - 1, 72)), ("w2", (2, H, 72)), ("w1", (H, 72)), ("w3", (3,))],
)
def test_an_expert_of_another_shape(checkpoint: Checkpoints, part: str, shape: tuple[int, ...]) -> None:
    name = f"{EXPERTS}.2.{part}.weight"
    refused(checkpoint("mixtral", add={name: weight(*shape)}), name, str(list(shape)))


def test_no_experts_at_all(checkpoint: Checkpoints) -> None:
    gone = experts_of(checkpoint, lambda name: name.startswith(EXPERTS))
    refused(checkpoint("mixtral", drop=gone), "model.layers.1.mlp.experts.gate_up_proj is missing")
