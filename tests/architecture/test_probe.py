"""The probe against what the modeling code of transformers does, and against small models with something hidden."""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from abliterate.architecture.probe import Probe, probe, project
from abliterate.architecture.writer import Path
from abliterate.errors import ArchitectureError

WIDTH = 48
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
COMMON = {"vocab_size": 103, "hidden_size": WIDTH, "num_hidden_layers": 2, "pad_token_id": 0, "use_cache": False}
DENSE = {**COMMON, **HEADS, "intermediate_size": 72, "max_position_embeddings": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
DEEPSEEK = {"moe_intermediate_size": 56, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
GPT2 = {"vocab_size": 103, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_inner": 72, "n_positions": 64}
BLOOM = {"vocab_size": 103, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4}
MAMBA = {**COMMON, "state_size": 8, "time_step_rank": 10, "use_bias": True}
OPT = {**COMMON, "num_attention_heads": 4, "ffn_dim": 72, "max_position_embeddings": 64, "dropout": 0.0}
XGLM = {"vocab_size": 103, "d_model": WIDTH, "num_layers": 2, "attention_heads": 4, "ffn_dim": 72}
RWKV = {**COMMON, "attention_hidden_size": 64, "intermediate_size": 72, "context_length": 64}

LLAMA = {
    "model.embed_tokens.weight": "1",
    "model.layers.*.self_attn.o_proj.weight": "0",
    "model.layers.*.mlp.down_proj.weight": "0",
}
GEMMA = {
    "model.embed_tokens.weight": "1",
    "model.layers.*.self_attn.o_proj.weight": "0 model.layers.*.post_attention_layernorm.weight+1",
    "model.layers.*.mlp.down_proj.weight": "0 model.layers.*.post_feedforward_layernorm.weight+1",
}
OLMO2 = {key: value.replace("+1", "") for key, value in GEMMA.items()}
BIASED = {f"model.layers.*.{key}.bias": "0" for key in ("self_attn.o_proj", "mlp.down_proj")}
BLOOM_EMBEDDING = {
    "transformer.word_embeddings.weight": "1 transformer.word_embeddings_layernorm.weight center",
    "transformer.word_embeddings_layernorm.bias": "0",
}


def _both(prefix: str, axis: int, *modules: str) -> dict[str, str]:
    return {
        f"{prefix}.{m}.{kind}": str(axis if kind == "weight" else 0) for m in modules for kind in ("weight", "bias")
    }


CASES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "llama": ("Llama", {**DENSE, "attention_bias": True, "mlp_bias": True}, {**LLAMA, **BIASED}),
    "gpt2": (
        "GPT2LMHead",
        GPT2,
        {
            "transformer.wte.weight": "1",
            "transformer.wpe.weight": "1",
            **_both("transformer.h.*", 1, "attn.c_proj", "mlp.c_proj"),
        },
    ),
    "gemma2": ("Gemma2", {**DENSE, "query_pre_attn_scalar": 16}, GEMMA),
    "gemma3_text": ("Gemma3", {**DENSE, "query_pre_attn_scalar": 16}, GEMMA),
    "olmo2": ("Olmo2", DENSE, OLMO2),
    "gpt_neox": (
        "GPTNeoX",
        {**COMMON, "num_attention_heads": 4, "intermediate_size": 72},
        {
            "gpt_neox.embed_in.weight": "1",
            **_both("gpt_neox.layers.*", 0, "attention.dense", "mlp.dense_4h_to_h"),
        },
    ),
    "mixtral": (
        "Mixtral",
        {**DENSE, **EXPERTS},
        {
            "model.embed_tokens.weight": "1",
            "model.layers.*.self_attn.o_proj.weight": "0",
            "model.layers.*.mlp.experts.down_proj": "1",
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**DENSE, **LATENT, **DEEPSEEK, "num_key_value_heads": 4, "first_k_dense_replace": 1, "head_dim": 8},
        {
            **LLAMA,
            "model.layers.*.mlp.experts.down_proj": "1",
            "model.layers.*.mlp.shared_experts.down_proj.weight": "0",
        },
    ),
    "bloom": (
        "Bloom",
        BLOOM,
        {**BLOOM_EMBEDDING, **_both("transformer.h.*", 0, "self_attention.dense", "mlp.dense_4h_to_h")},
    ),
    "mamba": (
        "Mamba",
        MAMBA,
        {"backbone.embeddings.weight": "1", **_both("backbone.layers.*", 0, "mixer.out_proj")},
    ),
}


def _twin(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A random model of transformers' class for this name."""
    ends = ("ForCausalLM", "Model", "")
    kind = next(found for end in ends if (found := getattr(transformers, name + end, None)) is not None)
    config = kind.config_class(**settings)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).eval()
    _randomise(model)
    return model


def _randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() < 2 else 1 / math.sqrt(parameter.shape[-1])
            drawn = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + drawn if parameter.dim() < 2 else drawn)


def _folded(name: str | None) -> str:
    return re.sub(r"\.\d+\.", ".*.", name or "")


def _steps(path: Path | None) -> str:
    assert path is not None
    return " ".join(step.kind if step.kind == "center" else _step(step.tensor, step.offset) for step in path)


def _step(tensor: str | None, offset: float) -> str:
    return _folded(tensor) + ("+1" if offset else "")


def _writers(found: Probe) -> dict[str, str]:
    return {_folded(f.parameter): f"{f.axis} {_steps(f.through)}".strip() for f in found.found}


@pytest.mark.parametrize("name", CASES)
def test_writers(name: str) -> None:
    kind, settings, expected = CASES[name]
    found = probe(_twin(kind, settings))
    assert _writers(found) == expected
    assert found.residual < 1e-12 and found.fp64 and found.exact
    assert found.skip is None and set(found.boundaries) == {()} and not found.blocked
    assert len(found.layers) == 2
    assert all(f.seen and (f.cosine > 1 - 1e-9) == (f.through == ()) for f in found.found)


def test_readers_and_scales() -> None:
    found = probe(_twin("Gemma2", CASES["gemma2"][1]))
    readers = {_folded(name) for name in found.readers}
    assert {_folded(name) for name in found.scales} == {
        f"model.layers.*.post_{sublayer}_layernorm.weight" for sublayer in ("attention", "feedforward")
    }
    assert {"model.layers.*.self_attn.q_proj.weight", "model.layers.*.mlp.up_proj.weight"} <= readers
    assert {"model.layers.*.input_layernorm.weight", "model.norm.weight"} <= readers
    assert not readers & _writers(found).keys()


def test_gain_on_the_skip_path() -> None:
    """OPT-350m norms the stream after each addition, so that r turns from layer to layer."""
    model = _twin("OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32})
    found = probe(model)
    assert found.exact and found.skip is not None and found.skip.shape == (3, WIDTH)
    norms = [f"model.decoder.layers.1.{norm}.weight" for norm in ("final_layer_norm", "self_attn_layer_norm")]
    assert _steps(found.boundaries[1]) == " center ".join(map(_folded, norms)) + " center"
    parameters = dict(model.named_parameters())
    expected = found.r
    for norm in norms:
        expected = expected * parameters[norm].detach().double()
        expected = expected - expected.mean()
    assert torch.allclose(found.skip[1], expected / expected.norm(), atol=1e-9)
    writers = {f.parameter: f for f in found.found}
    attention = writers["model.decoder.layers.1.self_attn.out_proj.weight"]
    assert (attention.boundary, attention.through) == (1, ())
    mlp = writers["model.decoder.layers.1.fc2.weight"]
    assert (mlp.boundary, _steps(mlp.through)) == (2, _folded(norms[0]) + " center")
    assert writers["model.decoder.project_in.weight"].axis == 0


def test_blocked() -> None:
    gated = probe(_twin("Rwkv", RWKV))
    assert not gated.exact
    assert {_folded(name) for name in gated.blocked} == {"rwkv.blocks.*.feed_forward.value.weight"}
    assert min(gated.blocked.values()) > 8
    positions = probe(_twin("XGLM", XGLM))
    assert not positions.exact and positions.blocked == {"model.embed_positions.weights": 1}


def test_leaves_the_model_as_it_was() -> None:
    model = _twin("Gemma2", {**CASES["gemma2"][1], "use_cache": True})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = probe(model), probe(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    assert model.config.use_cache and torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert first.residuals == second.residuals
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


Write = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """A decoder layer with one sublayer, and one more way to write to the stream."""

    def __init__(self, write: Write | None = None) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 72), nn.Linear(72, WIDTH)
        self.other, self.gate = nn.Linear(72, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.kernel = nn.Parameter(torch.zeros(WIDTH, 1, 3))
        self.experts = nn.ModuleList(nn.Linear(72, WIDTH, bias=False) for _ in range(3))
        self.write = write

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.up(self.norm(hidden)).relu()
        hidden = hidden + self.down(inner)
        return hidden if self.write is None else hidden + self.write(self, inner)


class Toy(nn.Module):
    """A decoder of two blocks, of which the second has a way to write of its own."""

    def __init__(self, write: Write | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.embed, self.norm = nn.Embedding(103, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList([Block(), Block(write)])
        _randomise(self)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)


def _unseen(block: Block, inner: Tensor) -> Tensor:
    return torch.from_numpy(inner.detach().numpy() @ block.other.weight.detach().numpy().T)


def _without_gradient(block: Block, inner: Tensor) -> Tensor:
    with torch.no_grad():
        return block.other(inner).detach()


def _gated(block: Block, inner: Tensor) -> Tensor:
    x = block.other(inner)
    return x * nn.functional.silu(block.gate(x))


def _convolved(block: Block, inner: Tensor) -> Tensor:
    x = block.other(inner)
    padded = nn.functional.pad(x.transpose(1, 2), (2, 0))
    return x + nn.functional.conv1d(padded, block.kernel, groups=WIDTH).transpose(1, 2)


def _routed(block: Block, inner: Tensor) -> Tensor:
    """Expert 2 sees no token of the first run."""
    out = torch.zeros(*inner.shape[:-1], WIDTH, dtype=inner.dtype)
    chosen = torch.arange(inner.shape[1]) % 2
    for expert in (0, 1):
        out[:, chosen == expert] = block.experts[expert](inner[:, chosen == expert])
    return out


def test_what_gradients_cannot_see_shows_in_the_residual() -> None:
    found = probe(Toy(_unseen))
    assert not found.exact and found.residual > 1e-3
    assert max(found.residuals[:2]) < 1e-12  # the embedding and the first block are clean
    assert not any(f.parameter == "layers.1.other.weight" for f in found.found)


def test_writers_without_gradient_are_seen() -> None:
    found = probe(Toy(_without_gradient))
    assert found.exact and any(f.parameter == "layers.1.other.weight" for f in found.found)


def test_gate_of_every_channel_blocks() -> None:
    found = probe(Toy(_gated))
    assert not found.exact and "layers.1.other.weight" in found.blocked
    assert "layers.1.up.weight" not in found.blocked  # it reads


def test_convolution_after_a_writer() -> None:
    found = probe(Toy(_convolved))
    other = next(f for f in found.found if f.parameter == "layers.1.other.weight")
    assert found.exact and other.covectors.shape == (WIDTH, 3) and other.axis == 0
    assert other.through is not None
    assert [(step.kind, step.tensor) for step in other.through] == [("taps", "layers.1.kernel")]


def test_expert_without_tokens_is_taken_to_be_like_the_others() -> None:
    found = {f.parameter: f for f in probe(Toy(_routed)).found}
    seen = [found[f"layers.1.experts.{expert}.weight"].seen for expert in range(3)]
    assert seen == [True, True, False]
    assert not any(name.startswith("layers.0.experts") for name in found)  # they are never called


def test_no_layers_to_be_found() -> None:
    model = Toy()
    model.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
    with pytest.raises(ArchitectureError, match="no decoder layers"):
        probe(model)


class TwoStreams(Toy):
    """Hands on what a sublayer gives beside the stream that it shall be added to."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.forward = lambda x, rest, layer=layer: (layer.down(layer.up(layer.norm(x + rest)).relu()), x + rest)

    def forward(self, input_ids: Tensor) -> Tensor:
        state = (self.embed(input_ids), torch.zeros(1))
        for layer in self.layers:
            state = layer(*state)
        return self.norm(sum(state))


def test_two_streams_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="more than one stream"):
        probe(TwoStreams())


def test_model_that_does_not_run() -> None:
    with pytest.raises(ArchitectureError, match="unexpected keyword argument"):
        probe(Toy(), {"pixels": torch.zeros(1)})


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_project(axis: int) -> None:
    tensor = torch.randn(5, 5, 5, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64))[0]
    before = tensor.clone()
    project(tensor, axis, basis)
    assert float((tensor.movedim(axis, -1) @ basis).abs().max()) < 1e-12
    assert float(((before - tensor).movedim(axis, -1) @ torch.eye(5, dtype=torch.float64)).norm()) > 0
