"""Layers for next-token prediction, which transformers leaves alone and others run: they write to the stream too."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from abliterate import convert
from abliterate.certify.weights import shares_along
from abliterate.checkpoint.files import open_checkpoint
from abliterate.edit.edits import Projectors
from tests import pico
from tests.architecture.planned import Checkpoints, H, names, planned, refused, role, stored, weight, writer

V = pico.VOCABULARY
R = pico.unit()
Make = Callable[[Path], dict[str, Tensor]]


def deepseek(folder: Path, number: int = 3) -> dict[str, Tensor]:
    """DeepSeek-V3's: a layer after the last, a copy of that one, with a projection of what came before."""
    last, place = "model.layers.2.", f"model.layers.{number}."
    copied = {name: tensor for name, tensor in stored(folder).items() if name.startswith(last)}
    layer = {name.removeprefix(last): tensor.flip(0) for name, tensor in copied.items()} | {
        "eh_proj.weight": weight(H, 2 * H, seed=1),
        "enorm.weight": weight(H, seed=2),
        "hnorm.weight": weight(H, seed=3),
        "embed_tokens.weight": stored(folder)["model.embed_tokens.weight"],
        "shared_head.norm.weight": weight(H, seed=4),
        "shared_head.head.weight": stored(folder)["lm_head.weight"],
    }
    return {place + name: tensor.contiguous() for name, tensor in layer.items()}


def qwen(folder: Path) -> dict[str, Tensor]:
    """Qwen3-Next's: a model of its own, with a layer like those of the main one."""
    last = "model.layers.3."
    copied = {name: tensor for name, tensor in stored(folder).items() if name.startswith(last)}
    layer = {f"mtp.layers.0.{name.removeprefix(last)}": tensor.flip(0).contiguous() for name, tensor in copied.items()}
    return layer | {
        "mtp.fc.weight": weight(H, 2 * H, seed=1),
        "mtp.pre_fc_norm_embedding.weight": weight(H, seed=2),
        "mtp.pre_fc_norm_hidden.weight": weight(H, seed=3),
        "mtp.norm.weight": weight(H, seed=4),
    }


EXPERTS = [f"mlp.experts.{expert}.down_proj.weight" for expert in range(4)]
DEEPSEEK = {
    f"model.layers.3.{name}"
    for name in (
        "eh_proj.weight",
        "embed_tokens.weight",
        "self_attn.o_proj.weight",
        "mlp.shared_experts.down_proj.weight",
        *EXPERTS,
    )
}
QWEN = {"mtp.fc.weight"} | {
    f"mtp.layers.0.{name}" for name in ("self_attn.o_proj.weight", "mlp.shared_expert.down_proj.weight", *EXPERTS)
}
CASES: list[tuple[str, Make, set[str]]] = [("deepseek_v3", deepseek, DEEPSEEK), ("qwen3_next", qwen, QWEN)]
each = pytest.mark.parametrize(("family", "make", "expected"), CASES, ids=[case[0] for case in CASES])


@each
def test_what_writes_there_is_a_writer(checkpoint: Checkpoints, family: str, make: Make, expected: set[str]) -> None:
    base = checkpoint(family)
    usual, added = planned(base), make(base)
    plan = planned(checkpoint(family, add=added))
    found = {w.tensor for w in plan.writers} - {w.tensor for w in usual.writers}
    assert found == expected
    assert [w for w in plan.writers if w.tensor not in found] == list(usual.writers)
    assert {w.tensor for w in plan.writers[-len(expected) :]} == expected, "they come last"
    assert plan.num_layers == usual.num_layers and plan.runtime == usual.runtime and plan.head == usual.head
    assert all(w.gain == () and w.skip == () for w in plan.writers)
    assert not names(plan, "unknown")
    assert all("(not used by transformers)" in role(plan, name).reason for name in added)
    kinds = {w.kind for w in plan.writers if w.tensor in expected}
    assert kinds == {"projector", "attention", "mlp"} | ({"embedding"} if family == "deepseek_v3" else set())


@each
def test_what_does_not_write_there_is_known_too(
    checkpoint: Checkpoints, family: str, make: Make, expected: set[str]
) -> None:
    base = checkpoint(family)
    plan = planned(checkpoint(family, add=make(base)))
    norms = names(plan, "norm")
    if family == "deepseek_v3":
        assert {f"model.layers.3.{name}.weight" for name in ("enorm", "hnorm", "shared_head.norm")} <= norms
        assert role(plan, "model.layers.3.shared_head.head.weight").role == "reader"
    else:
        assert {"mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.norm.weight"} <= norms
        assert role(plan, "mtp.layers.0.mlp.shared_expert_gate.weight").role == "reader"


@each
def test_a_conversion_takes_the_direction_out_there(
    checkpoint: Checkpoints, family: str, make: Make, expected: set[str]
) -> None:
    base = checkpoint(family)
    pico.rewrite(base, add=make(base))
    direction = pico.direction_file(base.parent / "r.safetensors")
    result = convert(str(base), base.parent / "out", direction=direction, evaluate=False)
    assert result.holds and result.certificate.exact
    assert expected <= {residual.tensor for residual in result.certificate.writers}
    before, after = stored(base), stored(result.folder)
    assert set(after) == set(before)
    for name in expected:
        turned = name.endswith("embed_tokens.weight")
        was, now = (tensors[name].double().T if turned else tensors[name].double() for tensors in (before, after))
        assert float((R.double() @ now).norm()) < 1e-6 * float(now.norm())
        assert float((R.double() @ was).norm()) > 0.05 * float(was.norm())
    unchanged = set(make(base)) - expected
    assert unchanged and all(torch.equal(after[name], before[name]) for name in unchanged)


def test_a_norm_there_is_the_gain_of_its_own_layer(checkpoint: Checkpoints) -> None:
    olmo = checkpoint("olmo2")
    added = {
        "mtp.fc.weight": weight(H, 2 * H),
        "mtp.layers.0.mlp.down_proj.weight": weight(H, 72),
        "mtp.layers.0.post_feedforward_layernorm.weight": weight(H),
    }
    plan = planned(pico.rewrite(olmo, add=added))
    (step,) = writer(plan, "mtp.layers.0.mlp.down_proj.weight").gain
    assert step.tensor == "mtp.layers.0.post_feedforward_layernorm.weight"
    checked = open_checkpoint(olmo)
    projector = Projectors(checked, H, R).of(writer(plan, "mtp.layers.0.mlp.down_proj.weight"))
    expected = R.double() * added["mtp.layers.0.post_feedforward_layernorm.weight"].double()
    torch.testing.assert_close(projector.v, expected)
    assert shares_along(checked, writer(plan, "mtp.fc.weight"), [R.double()])[0][0] > 0.05


@pytest.mark.parametrize("number", [4, 10, 61])
def test_whatever_their_number(checkpoint: Checkpoints, number: int) -> None:
    base = checkpoint("deepseek_v3")
    plan = planned(pico.rewrite(base, add=deepseek(base, number)))
    assert writer(plan, f"model.layers.{number}.eh_proj.weight").layer == number and plan.num_layers == 3


def test_several_of_them(checkpoint: Checkpoints) -> None:
    base = checkpoint("deepseek_v3")
    plan = planned(pico.rewrite(base, add=deepseek(base, 3) | deepseek(base, 4)))
    assert [w.layer for w in plan.writers if w.tensor.endswith("eh_proj.weight")] == [3, 4]


@pytest.mark.parametrize("prefix", ["", "model.", "language_model."])
def test_at_any_depth(checkpoint: Checkpoints, prefix: str) -> None:
    base = checkpoint("qwen3_next")
    plan = planned(pico.rewrite(base, add={prefix + name: tensor for name, tensor in qwen(base).items()}))
    assert {prefix + name for name in QWEN} <= names(plan, "writer")


def test_a_copy_of_the_embedding_there(checkpoint: Checkpoints) -> None:
    base = checkpoint("qwen3_next")
    plan = planned(pico.rewrite(base, add=qwen(base) | {"mtp.embed_tokens.weight": weight(V, H)}))
    assert writer(plan, "mtp.embed_tokens.weight").axis == 1 and plan.embedding == "model.embed_tokens.weight"


STRAY: list[tuple[str, Mapping[str, tuple[int, ...]]]] = [
    ("deepseek_v3", {"model.layers.3.extra.weight": (5, H)}),
    ("deepseek_v3", {"model.layers.3.mlp.extra.weight": (H, 5)}),
    ("deepseek_v3", {"model.layers.3.shared_head.extra": (H,)}),
    ("deepseek_v3", {"mtp.eh_proj.weight": (H, 5)}),
    ("qwen3_next", {"mtp.extra.weight": (5, H)}),
    ("qwen3_next", {"mtp.lm_head.weight": (V, H)}),
    ("qwen3_next", {"mtp.layers.0.extra.weight": (H, 5)}),
    ("qwen3_next", {"mtp2.fc.weight": (H, 5)}),
    ("qwen3_next", {"model.layers.4.mlp.down_proj.weight": (H, 5)}),
]


@pytest.mark.parametrize(("family", "stray"), STRAY, ids=[next(iter(stray)) for _, stray in STRAY])
def test_a_tensor_there_that_is_not_in_the_table(
    checkpoint: Checkpoints, family: str, stray: Mapping[str, tuple[int, ...]]
) -> None:
    base = checkpoint(family)
    added = deepseek(base) if family == "deepseek_v3" else qwen(base)
    ((name, shape),) = stray.items()
    refused(checkpoint(family, add=added | {name: torch.zeros(shape)}), f"{name} {list(shape)}", "is not accounted for")
    narrow = {name: torch.zeros(7, 5)}
    assert role(planned(pico.rewrite(base, add=added | narrow)), name).role == "unknown"


def test_they_are_refused_where_the_table_does_not_have_them(checkpoint: Checkpoints) -> None:
    mixtral, deep = checkpoint("mixtral"), checkpoint("deepseek_v3")
    refused(pico.rewrite(mixtral, add=deepseek(deep)), "model.layers.3.", "is not accounted for")
    refused(pico.rewrite(mixtral, drop=deepseek(deep), add=qwen(checkpoint("qwen3_next"))), "mtp.", "is not accounted")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("eh_proj.weight", (2 * H, H)),
        ("eh_proj.weight", (2 * H, 2 * H)),
        ("mlp.experts.1.down_proj.weight", (H - 1, 20)),
        ("mlp.shared_experts.down_proj.weight", (20, H)),
        ("embed_tokens.weight", (V, H - 1)),
    ],
)
def test_a_writer_there_of_another_shape(checkpoint: Checkpoints, name: str, shape: tuple[int, ...]) -> None:
    """Transformers does not read them, so that nothing else would notice."""
    base, place = checkpoint("deepseek_v3"), "model.layers.3."
    refused(pico.rewrite(base, add=deepseek(base) | {place + name: torch.zeros(shape)}), place + name, str(list(shape)))


def test_one_there_that_is_quantized(checkpoint: Checkpoints) -> None:
    base, name = checkpoint("deepseek_v3"), "model.layers.3.eh_proj.weight"
    wrong = deepseek(base) | {name: torch.zeros(H, 2 * H).to(torch.float8_e4m3fn)}
    refused(pico.rewrite(base, add=wrong), name, "F8_E4M3", "unquantized")


def test_decoder_layers_do_not_pass_for_next_token_layers(checkpoint: Checkpoints) -> None:
    """A count in config.json that is too small would leave the last layers out of the forward pass."""
    refused(
        checkpoint("deepseek_v3", config={"num_hidden_layers": 2}), "layers.2.", "config.json counts too few layers"
    )
