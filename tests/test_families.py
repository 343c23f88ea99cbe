"""Every supported family, converted from end to end, and measured with hooks written only here."""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from abliterate import Conversion, Recipe, convert, load_recipe
from abliterate.architecture.plan import plan_architecture
from abliterate.calibration.hooks import Steer
from abliterate.calibration.load import load_resident
from abliterate.checkpoint.files import open_checkpoint
from tests import pico

R = pico.unit()


@dataclass(frozen=True)
class Names:
    """Where a family has what: modules that write to the stream, tensors to be edited, layers, final norm."""

    stem: tuple[str, ...]
    written: tuple[str, ...]
    edited: tuple[str, ...]
    layers: str
    final: str
    head: str = "lm_head.weight"


_LLAMA = Names(
    ("model.embed_tokens",),
    ("self_attn.o_proj", "mlp.down_proj"),
    ("self_attn.o_proj", "mlp.down_proj"),
    "model.layers",
    "model.norm",
)
_GEMMA = Names(
    _LLAMA.stem,
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    _LLAMA.edited,
    _LLAMA.layers,
    _LLAMA.final,
)
_GPT2 = Names(
    ("transformer.wte", "transformer.wpe"),
    ("attn.c_proj", "mlp.c_proj"),
    ("attn.c_proj", "mlp.c_proj"),
    "transformer.h",
    "transformer.ln_f",
)
_GPT_NEOX = Names(
    ("gpt_neox.embed_in",),
    ("attention.dense", "mlp.dense_4h_to_h"),
    ("attention.dense", "mlp.dense_4h_to_h"),
    "gpt_neox.layers",
    "gpt_neox.final_layer_norm",
    "embed_out.weight",
)
_OPT = Names(
    ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    ("self_attn.out_proj", "fc2"),
    ("self_attn.out_proj", "fc2"),
    "model.decoder.layers",
    "model.decoder.final_layer_norm",
)
NAMES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
}
NORMED = ("gemma2", "gemma3_text")


@dataclass(frozen=True)
class Case:
    """One conversion. `head`: separate in the base, or tied and then, by the recipe, tied or untied."""

    family: str
    head: str
    dtype: torch.dtype = torch.float32

    @property
    def names(self) -> Names:
        return NAMES[self.family]

    def __str__(self) -> str:
        return f"{self.family}-{self.head}-{str(self.dtype).removeprefix('torch.')}"


FP32 = [Case(family, head) for family in pico.FAMILIES for head in ("separate", "untied", "tied")]
BF16 = [Case(case.family, case.head, torch.bfloat16) for case in FP32]


@dataclass(frozen=True)
class Converted:
    """A pico model and what became of it."""

    case: Case
    base: Path
    out: Path
    result: Conversion


def recipe(head: str) -> Recipe:
    return load_recipe("refusal").replacing("edit", head="tied" if head == "tied" else "untied")


def run(case: Case, folder: Path, **options: Any) -> Converted:
    base = pico.save(folder / "base", case.family, dtype=case.dtype, tied=case.head != "separate", **options)
    direction = pico.direction_file(folder / "r.safetensors")
    result = convert(str(base), folder / "out", recipe=recipe(case.head), direction=direction, evaluate=False)
    return Converted(case, base, result.folder, result)


@pytest.fixture(scope="module")
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return run(request.param, tmp_path_factory.mktemp("m"))


def each(cases: list[Case]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return pytest.mark.parametrize("converted", cases, indirect=True, ids=str)


def load(folder: Path) -> nn.Module:
    """In fp32, with every tensor of the file in use and no other."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(0, pico.VOCABULARY, (5, 23), generator=torch.Generator().manual_seed(3))


@contextmanager
def hooked(model: nn.Module, names: Names, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Changes what every module that writes to the stream puts out."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    layers = len(model.get_submodule(names.layers))
    places = [f"{names.layers}.{i}.{name}" for i in range(layers) for name in names.written]
    with ExitStack() as stack:
        for place in (*names.stem, *places):
            stack.callback(model.get_submodule(place).register_forward_hook(hook).remove)
        yield


def ablated(hidden: Tensor) -> Tensor:
    return hidden - (hidden @ R)[..., None] * R


@contextmanager
def ablated_head(model: nn.Module) -> Iterator[None]:
    """What the edit of a tied embedding does to the head."""
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: (ablated(args[0]),))
    with ExitStack() as stack:
        stack.callback(handle.remove)
        yield


@torch.no_grad()
def stream_residual(model: nn.Module, names: Names) -> float:
    """max abs(h . r) / norm(h) over tokens, at the input of every layer and of the final norm."""
    seen: list[Tensor] = []

    def watch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = (args[0] if args else kwargs["hidden_states"]).double()
        seen.append(((hidden @ R.double()).abs() / hidden.norm(dim=-1)).max())

    modules = [*model.get_submodule(names.layers), model.get_submodule(names.final)]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        model(tokens())
    assert len(seen) == len(modules)
    return float(torch.stack(seen).max())


def is_edited(name: str, case: Case) -> bool:
    names = case.names
    if re.fullmatch(rf"{re.escape(names.layers)}\.\d+\.({'|'.join(names.edited)})\.(weight|bias)", name):
        return True
    return name.rpartition(".")[0] in names.stem


def shards(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON headers of all safetensors files with weights, by name."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        data = path.read_bytes()
        found[path.name] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


@each(FP32 + BF16)
def test_the_certificate_holds(converted: Converted) -> None:
    certificate = converted.result.certificate
    assert converted.result.holds and certificate.holds and certificate.exact, certificate.claim
    assert converted.out.name == "out"
    assert certificate.text == "random"
    held = {writer.tensor for writer in certificate.writers}
    assert held == {name for name in tensors(converted.base) if is_edited(name, converted.case)}


@each(FP32 + BF16)
def test_nothing_is_left_in_the_stream(converted: Converted) -> None:
    case = converted.case
    bound = 1e-6 if case.dtype == torch.float32 else 0.02 / math.sqrt(pico.HIDDEN)
    assert stream_residual(load(converted.base), case.names) > 0.2
    assert stream_residual(load(converted.out), case.names) <= bound


@each(FP32 + BF16)
def test_only_writers_change(converted: Converted) -> None:
    before, after = tensors(converted.base), tensors(converted.out)
    head = converted.case.names.head
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert changed == {name for name in before if is_edited(name, converted.case)}
    if converted.case.head == "untied":
        assert set(after) - set(before) == {head}
        assert same_bits(after[head], before[f"{converted.case.names.stem[0]}.weight"])
    else:
        assert set(after) == set(before)


@each(FP32 + BF16)
def test_files_are_laid_out_as_before(converted: Converted) -> None:
    before, after = shards(converted.base), shards(converted.out)
    assert list(before) == list(after)
    untied = converted.case.head == "untied"
    for shard, header in before.items():
        kept = list(after[shard].items())
        added = kept.pop() if untied else None
        assert kept == list(header.items())
        assert added is None or added[0] == converted.case.names.head
    config = json.loads((converted.base / "config.json").read_text())
    if untied:
        config["tie_word_embeddings"] = False
        assert json.loads((converted.out / "config.json").read_text()) == config
    else:
        assert (converted.out / "config.json").read_bytes() == (converted.base / "config.json").read_bytes()


@each([case for case in FP32 if case.family not in NORMED])
def test_logits_equal_ablation_at_run_time(converted: Converted) -> None:
    model, names = load(converted.base), converted.case.names
    with torch.no_grad(), ExitStack() as stack:
        unedited = model(tokens()).logits
        stack.enter_context(hooked(model, names, ablated))
        if converted.case.head == "tied":
            stack.enter_context(ablated_head(model))
        expected = model(tokens()).logits
        actual = load(converted.out)(tokens()).logits
    assert float((unedited - expected).abs().max()) > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@each([case for case in FP32 if case.head != "untied"])
def test_the_hooks_of_calibration_reach_every_writer(converted: Converted) -> None:
    """Each row has its own direction, or none; rows of different lengths."""
    case, cpu = converted.case, torch.device("cpu")
    plan = plan_architecture(open_checkpoint(converted.base))
    resident = load_resident(converted.base, plan, device=cpu, dtype=torch.float32, tied_head=case.head == "tied")
    prompts = [row[: 23 - 4 * i].tolist() for i, row in enumerate(tokens())]
    steers = [Steer(ablate=R) if i % 2 else Steer() for i in range(len(prompts))]
    (batch,) = resident.forward(prompts, steers)
    model = load(converted.base)
    for row, logits in zip(batch.rows, batch.logits, strict=True):
        with ExitStack() as stack, torch.no_grad():
            if row % 2:
                stack.enter_context(hooked(model, case.names, ablated))
            if row % 2 and case.head == "tied":
                stack.enter_context(ablated_head(model))
            expected = model(torch.tensor([prompts[row]])).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", NORMED)
def test_a_gain_behind_a_writer_needs_the_oblique_form(family: str, tmp_path: Path) -> None:
    case = Case(family, "separate")
    made = run(case, tmp_path)
    model = load(made.base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(case.names.stem[0]):
                parameter.copy_(ablated(parameter))
            elif is_edited(name, case):
                parameter.copy_(ablated(parameter.movedim(0, -1)).movedim(-1, 0))
    assert stream_residual(model, case.names) > 0.1
    assert stream_residual(load(made.out), case.names) <= 1e-6
    forms = made.result.manifest["edit"]["writers"]
    assert {writer["form"] for writer in forms if writer["gain"]} == {"oblique"}


@pytest.mark.parametrize("head", ["separate", "untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_shards_hold_the_same_as_one_file(family: str, head: str, tmp_path: Path) -> None:
    case = Case(family, head, torch.bfloat16)
    single, sharded = run(case, tmp_path / "one"), run(case, tmp_path / "many", shards=3)
    one, many = tensors(single.out), tensors(sharded.out)
    assert len(shards(sharded.out)) > 1 and list(shards(sharded.out)) == list(shards(sharded.base))
    assert one.keys() == many.keys() and all(same_bits(one[name], many[name]) for name in one)
    assert sharded.result.holds
    index = json.loads((sharded.out / "model.safetensors.index.json").read_text())
    placed = {name: shard for shard, header in shards(sharded.out).items() for name in header if name[0] != "_"}
    assert index["weight_map"] == placed
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    load(sharded.out)


@pytest.mark.parametrize("case", [Case("gemma2", "untied", torch.bfloat16), Case("gpt2", "tied")], ids=str)
def test_twice_gives_the_same_bytes(case: Case, tmp_path: Path) -> None:
    first, second = run(case, tmp_path / "a", shards=2), run(case, tmp_path / "b", shards=2)
    files = {path.relative_to(first.out): path for path in first.out.rglob("*") if path.is_file()}
    again = {path.relative_to(second.out): path for path in second.out.rglob("*") if path.is_file()}
    assert files.keys() == again.keys() and Path("abliteration.json") in files
    for name, path in files.items():
        assert path.read_bytes() == again[name].read_bytes(), name


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_stored_copy_of_a_tied_head(head: str, tmp_path: Path) -> None:
    case = Case("qwen3", head)
    base = pico.save(tmp_path / "base", "qwen3", tied=True)
    stored = load_file(base / "model.safetensors")
    embedding = stored["model.embed_tokens.weight"]
    pico.rewrite(base, add={"lm_head.weight": embedding.clone()})
    direction = pico.direction_file(tmp_path / "r.safetensors")
    result = convert(str(base), tmp_path / "out", recipe=recipe(head), direction=direction, evaluate=False)
    assert result.holds
    after = tensors(result.folder)
    assert after.keys() == {*stored, "lm_head.weight"}
    kept = after["model.embed_tokens.weight"] if head == "tied" else embedding
    assert same_bits(after["lm_head.weight"], kept)
    config = json.loads((result.folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is (head == "tied")
    model = load(result.folder)
    assert torch.equal(model.get_output_embeddings().weight, kept)
    assert stream_residual(model, case.names) <= 1e-6


MASK = torch.ones(1, 1, 8, 8)
AS_RELEASED: list[tuple[str, str, str, dict[str, Tensor]]] = [
    ("gpt2", "transformer.", "", {"h.0.attn.bias": MASK, "h.1.attn.masked_bias": torch.tensor(-1e4)}),
    ("gpt_neox", "", "", {"gpt_neox.layers.0.attention.bias": MASK.bool()}),
    ("opt", "model.", "", {"decoder.version": torch.tensor([3.0])}),
    ("llama", "", "", {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(5)}),
]


@pytest.mark.parametrize(("family", "old", "new", "buffers"), AS_RELEASED, ids=[case[0] for case in AS_RELEASED])
def test_names_as_in_older_checkpoints(
    family: str, old: str, new: str, buffers: dict[str, Tensor], tmp_path: Path
) -> None:
    base = pico.save(tmp_path / "base", family)
    pico.rewrite(base, rename=lambda name: new + name.removeprefix(old), add=buffers)
    direction = pico.direction_file(tmp_path / "r.safetensors")
    result = convert(str(base), tmp_path / "out", direction=direction, evaluate=False)
    before, after = tensors(base), tensors(result.folder)
    assert result.holds and before.keys() <= after.keys()
    assert all(same_bits(after[name], buffer) for name, buffer in buffers.items())
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert stream_residual(model.eval(), NAMES[family]) <= 1e-6


def test_metadata_survives(tmp_path: Path) -> None:
    base = pico.save(tmp_path / "base", "llama")
    pico.rewrite(base, metadata={"format": "pt", "made by": "someone"})
    direction = pico.direction_file(tmp_path / "r.safetensors")
    result = convert(str(base), tmp_path / "out", direction=direction, evaluate=False)
    with safe_open(result.folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "someone"}
