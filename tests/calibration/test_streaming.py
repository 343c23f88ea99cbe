"""A model whose layers come and go gives the numbers of one in memory, to the last bit, and holds one layer."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.architecture import conversion
from abliterate.calibration import runner, spool, store, streaming
from abliterate.calibration.hooks import Steer
from abliterate.calibration.memory import Placement
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.runner import Resident, Streamed
from abliterate.calibration.store import LayerStore
from abliterate.checkpoint.locate import Source
from abliterate.direction.firstorder import first_order_bypass
from abliterate.errors import CheckpointError
from abliterate.subject import RunOptions, Subject, load_model, subject_at
from tests import pico

CPU = torch.device("cpu")
PROMPTS = [[7, 20, 33, 41, 90, 12, 55], [8, 9, 100, 101], [60, 61, 62, 63, 64, 65], [9, 8, 7], [50] * 11]
R = pico.unit()
STEERS = [Steer(ablate=R), Steer(), Steer(add=3 * R, layer=1), Steer(ablate=-R), Steer(add=R, layer=0)]
MODELS = [*pico.FAMILIES, *pico.OTHERS]


class Tokenizer:
    eos_token_id = 2

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Subject]:
    @functools.cache
    def made(family: str, dtype: torch.dtype = torch.float32, shards: int = 1) -> Subject:
        folder = pico.save(tmp_path_factory.mktemp("streamed") / "m", family, dtype=dtype, shards=shards)
        return subject_at(Source(folder, None, None, None))

    return made


def load(subject: Subject, memory: str, dtype: str = "float32", **settings: Any) -> LanguageModel:
    options = RunOptions(memory=memory, batch_size=2, dtype=dtype)
    return load_model(subject, options, tokenizer=Tokenizer(), **settings)


def numbers(model: LanguageModel, generate: bool = True) -> dict[str, Any]:
    """Everything that is computed with a model."""
    found: dict[str, Any] = {}
    for name, steers in (("plain", None), ("steered", STEERS)):
        for batch in model.forward(PROMPTS, steers, positions=2):
            assert batch.hidden is not None
            found |= {f"{name} {row}": logits for row, logits in zip(batch.rows, batch.logits, strict=True)}
            found |= {f"{name} hidden {row}": h for row, h in zip(batch.rows, batch.hidden, strict=True)}
    found["first order"] = first_order_bypass(model, PROMPTS, [5, 9], torch.stack([R, pico.unit(seed=1)]))
    return found | ({"completions": model.generate(PROMPTS, 5)} if generate else {})


def same(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What differs."""
    assert first.keys() == second.keys()
    return [key for key, value in first.items() if not _equal(value, second[key])]


def _equal(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor):
        return bool(first == second)
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


@pytest.mark.parametrize("family", MODELS)
def test_the_same_bits_streamed_and_in_memory(subject: Callable[..., Subject], family: str) -> None:
    held, streamed = (load(subject(family), way) for way in ("resident", "streamed"))
    assert isinstance(held.runner, Resident) and isinstance(streamed.runner, Streamed)
    assert held.stream.names == streamed.stream.names and held.device == streamed.device == CPU
    expected = numbers(held)
    assert not same(expected, numbers(streamed))
    assert len({str(value) for value in expected.values()}) > 15, "the prompts make a difference"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "bert"])
@pytest.mark.parametrize("computed", ["bfloat16", "float16"])
def test_the_same_bits_in_few_bits(subject: Callable[..., Subject], family: str, computed: str) -> None:
    made = subject(family, torch.bfloat16, 3)
    held, streamed = (load(made, way, computed) for way in ("resident", "streamed"))
    assert not same(numbers(held), numbers(streamed)) and streamed.dtype == getattr(torch, computed)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "qwen3_next"])
def test_what_outgrows_memory_waits_on_the_disk(
    subject: Callable[..., Subject], family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Embedding, head, activations and caches in mapped files: the same bits, and nothing left behind."""
    beside, waiting = list[int](), list[int]()

    def counted(made: list[int], folder: Path, size: int) -> Tensor:
        made.append(size)
        return real(folder, size)

    real = spool.mapped
    monkeypatch.setattr(spool, "mapped", functools.partial(counted, waiting))
    monkeypatch.setattr(store, "mapped", functools.partial(counted, beside))
    monkeypatch.setattr(spool, "LEAST_BYTES", 0)
    expected = numbers(load(subject(family), "resident"))
    assert not beside and not waiting
    monkeypatch.setattr(store, "MAPPED_BYTES", 1000)
    monkeypatch.setattr(streaming, "SPOOL_BYTES", 0)
    streamed = load_model(
        subject(family), RunOptions(memory="streamed", batch_size=2, scratch=tmp_path), tokenizer=Tokenizer()
    )
    assert len(beside) == (1 if family == "gemma2" else 2), "embedding and head, or positions"
    assert not same(expected, numbers(streamed))
    waiting.clear()
    streamed.generate(PROMPTS, 3)
    outputs = 3 * 3 * len(streamed.stream.layers)  # batches and steps
    assert len(waiting) > outputs and not list(tmp_path.iterdir()), "caches as well"


@pytest.mark.parametrize(("held", "ahead"), [(0, True), (1, False), (2, True), (99, True)])
def test_layers_may_stay_and_may_come_early(
    subject: Callable[..., Subject], held: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_one, most = LayerStore.load, [0]

    def load_and_count(self: LayerStore, index: int) -> None:
        load_one(self, index)
        for coming in self._coming.values():
            coming.result()
        most[0] = max(most[0], sum(any(not p.is_meta for p in layer.parameters()) for layer in self.layers))

    monkeypatch.setattr(LayerStore, "load", load_and_count)
    made = subject("llama", torch.float32, 3)
    expected = numbers(load(made, "resident"))
    placed = Placement(True, held=held, ahead=ahead)
    model = streaming.load_streamed(
        made.checkpoint, made.plan, placed, device=CPU, dtype=torch.float32, scratch=made.folder, batch_size=2,
        tokenizer=Tokenizer(),
    )  # fmt: skip
    assert not same(expected, numbers(model))
    assert most[0] <= held + 1 + ahead, "beside those that stay, the one that computes and the next one"
    kept = [any(not p.is_meta for p in layer.parameters()) for layer in model.stream.layers]
    assert kept[: min(held, 3)] == [True] * min(held, 3)
    assert sum(kept) <= held + ahead, "beside those that stay, the one that comes next"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every layer that is loaded; meanwhile no other one is in memory."""
    loaded: list[int] = []
    real = LayerStore.load

    def load_one(self: LayerStore, index: int) -> None:
        real(self, index)
        loaded.append(index)
        full = [i for i, layer in enumerate(self.layers) if any(not p.is_meta for p in layer.parameters())]
        assert full == [index]

    monkeypatch.setattr(LayerStore, "load", load_one)
    yield loaded


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_one_layer_in_memory_and_each_read_once_a_run(
    subject: Callable[..., Subject], loads: list[int], family: str
) -> None:
    model = load(subject(family), "streamed")
    layers = list(range(len(model.stream.layers)))
    for run, expected in (
        (lambda: list(model.forward(PROMPTS, STEERS, positions=3)), layers),
        (lambda: model.generate(PROMPTS, 4), layers * 4),
        (lambda: first_order_bypass(model, PROMPTS, [5], R[None]), [*layers, *reversed(layers)]),
    ):
        loads.clear()
        run()
        assert loads == expected
    assert all(p.is_meta and not p.requires_grad for layer in model.stream.layers for p in layer.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_the_head_never_sees_a_slice(subject: Callable[..., Subject], memory: str) -> None:
    """torch would copy the head's weights for each prompt."""
    model, seen = load(subject("llama"), memory), list[bool]()
    with pytest.MonkeyPatch.context() as patch:
        forward = model.head.forward
        patch.setattr(model.head, "forward", lambda h: seen.append(h.is_contiguous()) or forward(h))  # type: ignore[func-returns-value]
        model.generate(PROMPTS, 2)
    assert len(seen) >= 3 and all(seen)


def test_a_run_says_what_a_token_costs(subject: Callable[..., Subject]) -> None:
    model = load(subject("llama"), "streamed")
    assert isinstance(model.runner, Streamed)
    weights = sum(i.nbytes for name, i in subject("llama").checkpoint.tensors.items() if ".layers." in name)
    model.generate(PROMPTS, 3)
    assert model.runner.pass_bytes == weights and model.runner.pass_seconds > 0


def test_the_slow_way_by_public_interfaces(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(streaming, "usable", lambda: False)
    for family in ("llama", "gemma3_text", "mixtral", "gpt2"):
        expected = numbers(load(subject(family), "resident"))
        model = load_model(
            subject(family), RunOptions(memory="streamed", batch_size=2, scratch=tmp_path), tokenizer=Tokenizer()
        )
        assert all(p.is_meta for layer in model.stream.layers for p in layer.parameters()) and model.device == CPU
        assert not same(expected, numbers(model))


def test_a_changed_interface_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The canary: what transformers does not promise is tried before it is used."""
    assert conversion.usable(), "transformers has changed: see abliterate/architecture/conversion.py"
    real = conversion.convert_and_load_state_dict_in_model

    def other_signature(model: Any, state_dict: Any) -> None:
        raise AssertionError("not reached")

    def other_result(model: Any, *args: Any) -> Any:
        done = real(model, *args)
        model.lm_head.weight.data += 1
        return done

    for changed, said in ((other_signature, "positional argument"), (other_result, "lm_head.weight is not filled")):
        conversion.trouble.cache_clear()
        monkeypatch.setattr(conversion, "convert_and_load_state_dict_in_model", changed)
        assert not conversion.usable() and said in caplog.text
    conversion.trouble.cache_clear()


def test_a_shard_that_changed_or_went_is_one_line(subject: Callable[..., Subject], tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "m", "llama", shards=3)
    model = load(subject_at(Source(folder, None, None, None)), "streamed")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        list(model.forward(PROMPTS))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not any(module._forward_hooks for module in model.model.modules())


def test_whatever_a_conversion_raises_is_one_line(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(subject("llama"), "streamed")

    def broken(*_: Any) -> None:
        raise KeyError("layers\n.1")

    monkeypatch.setattr(conversion.Filler, "fill", broken)
    with pytest.raises(CheckpointError, match="cannot be streamed") as caught:
        model.generate(PROMPTS, 2)
    assert "\n" not in str(caught.value)


def test_the_bar_goes_by_layers(subject: Callable[..., Subject]) -> None:
    """So that it moves: all prompts are done at the same time."""
    model = load(subject("llama"), "streamed")
    moved: list[int] = []

    class Shown:
        def bar(self, description: str, total: int, unit: str) -> Any:
            import contextlib

            assert (description, total, unit) == ("generate", 9, "layer")
            return contextlib.nullcontext(moved.append)

    bar = runner.Bar(Shown(), "generate", [2, 2, 1], 3)  # type: ignore[arg-type]
    calls = [lambda: model.model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1]] * 2
    assert [length for _, length in model.runner.run(calls, bar)] == [5, 5] and moved == [1] * 9
