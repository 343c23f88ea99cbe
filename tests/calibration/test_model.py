"""A model in memory against the plainest code that does the same: one prompt a time, hooks written here, a loop."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from abliterate.calibration.hooks import NOTHING, Steer
from abliterate.calibration.model import LanguageModel, capture_inputs, pad
from abliterate.errors import CalibrationError
from tests.resident import END, HIDDEN, byte_tokenizer, gpt2, llama, random_prompts, random_units, resident, writers_of

MAKERS: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=MAKERS, scope="module")
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return resident(MAKERS[request.param]())


def every_logit(model: Any, tokens: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def inputs_of_layers(model: LanguageModel, tokens: Sequence[int]) -> Tensor:
    """[layers, tokens, hidden], as transformers itself reports them."""
    with torch.no_grad():
        states = model.model(torch.tensor([list(tokens)]), output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat(states[: len(model.stream.layers)])


def steered_alone(model: LanguageModel, tokens: Sequence[int], steer: Steer) -> Tensor:
    """Last logits of one prompt, with plain hooks."""

    def ablated(_module: Any, _args: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        left = whole - torch.outer(whole.flatten(0, -2) @ steer.ablate, steer.ablate).view_as(whole)  # type: ignore[arg-type]
        return (left, *output[1:]) if isinstance(output, tuple) else left

    def added(_module: Any, args: Any, kwargs: Any) -> Any:
        return ((args[0] + steer.add, *args[1:]), kwargs)

    with ExitStack() as stack:
        if steer.ablate is not None:
            for module in writers_of(model.model).values():
                stack.callback(module.register_forward_hook(ablated).remove)
        if steer.add is not None and steer.layer is not None:
            layer = model.stream.layers[steer.layer]
            stack.callback(layer.register_forward_pre_hook(added, with_kwargs=True).remove)
        return every_logit(model.model, tokens)[-1]


def gathered(model: LanguageModel, prompts: Sequence[Sequence[int]], **settings: Any) -> tuple[Tensor, Tensor | None]:
    """Logits and hidden states in the order of the prompts."""
    logits: list[Any] = [None] * len(prompts)
    hidden: list[Any] = [None] * len(prompts)
    for batch in model.forward(prompts, **settings):
        for number, row in enumerate(batch.rows):
            assert logits[row] is None
            logits[row] = batch.logits[number]
            hidden[row] = batch.hidden[number] if batch.hidden is not None else None
    return torch.stack(logits), torch.stack(hidden) if hidden[0] is not None else None


def hooks_of(model: LanguageModel) -> list[int]:
    # transformers leaves hooks of its own, so only a difference says anything
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules()]


def greedy(model: Any, tokens: Sequence[int], count: int, ends: Sequence[int] = (END,)) -> list[int]:
    made: list[int] = []
    while len(made) < count:
        token = int(every_logit(model, [*tokens, *made])[-1].argmax())
        if token in ends:
            break
        made.append(token)
    return made


def test_padding_on_either_side() -> None:
    right, left = (pad([[5, 6, 7], [8]], torch.device("cpu"), left=left) for left in (False, True))
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_batches_hold_every_prompt_once_and_lengths_together(size: int) -> None:
    prompts = random_prompts(17)
    rows = list(resident(llama(layers=1), batch_size=size).batches(prompts))
    assert sorted(i for row in rows for i in row) == list(range(17)) and all(len(row) <= size for row in rows)
    lengths = [len(prompts[i]) for row in rows for i in row]
    assert lengths == sorted(lengths) and len(rows) == -(-17 // size)


@pytest.mark.parametrize("size", [1, 4, 32])
def test_logits_of_a_batch_are_those_of_one_prompt(model: LanguageModel, size: int) -> None:
    prompts = random_prompts(11)
    logits, hidden = gathered(resident(model.model, size), prompts)
    assert hidden is None and logits.dtype == torch.float32
    expected = torch.stack([every_logit(model.model, tokens)[-1] for tokens in prompts])
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("positions", [1, 3, 5])
def test_hidden_states_are_the_inputs_of_every_layer_at_the_last_positions(
    model: LanguageModel, positions: int
) -> None:
    prompts = random_prompts(11)
    _, hidden = gathered(model, prompts, positions=positions)
    assert hidden is not None
    assert hidden.shape == (11, positions, len(model.stream.layers), HIDDEN)
    for row, tokens in enumerate(prompts):
        expected = inputs_of_layers(model, tokens)[:, -positions:].transpose(0, 1)
        torch.testing.assert_close(hidden[row], expected, **CLOSE)


def test_rows_of_one_batch_are_steered_each_its_own_way(model: LanguageModel) -> None:
    prompts, units = random_prompts(12, seed=3), random_units(4)
    kinds = [
        Steer(ablate=units[0]), Steer(add=3 * units[1], layer=0), NOTHING, Steer(add=-2 * units[2], layer=1),
        Steer(ablate=units[3]), Steer(ablate=units[1], add=2 * units[0], layer=1),
    ]  # fmt: skip
    steers = [kinds[i % len(kinds)] for i in range(12)]
    logits, _ = gathered(resident(model.model, 12), prompts, steers=steers)
    for row, (tokens, steer) in enumerate(zip(prompts, steers, strict=True)):
        expected = steered_alone(model, tokens, steer)
        torch.testing.assert_close(logits[row], expected, **CLOSE)
        plain = every_logit(model.model, tokens)[-1]
        assert (steer is NOTHING) == torch.allclose(expected, plain, atol=1e-2)


def test_steering_goes_with_the_prompt_whatever_the_batches(model: LanguageModel) -> None:
    prompts, units = random_prompts(9, seed=5), random_units(9)
    steers = [Steer(ablate=unit) for unit in units]
    whole, _ = gathered(resident(model.model, 9), prompts, steers=steers)
    torch.testing.assert_close(gathered(resident(model.model, 2), prompts, steers=steers)[0], whole, **CLOSE)


def test_an_ablated_stream_has_no_component_left_and_an_added_one_is_seen(model: LanguageModel) -> None:
    prompts, units = random_prompts(8), random_units(8)
    _, hidden = gathered(model, prompts, steers=[Steer(ablate=unit) for unit in units], positions=3)
    assert hidden is not None
    assert float(torch.einsum("rpld,rd->rpl", hidden, units).abs().max()) < 1e-5 * float(hidden.norm(dim=-1).max())
    _, plain = gathered(model, prompts, positions=3)
    _, added = gathered(model, prompts, steers=[Steer(add=unit, layer=1) for unit in units], positions=3)
    assert plain is not None and added is not None
    torch.testing.assert_close(added[:, :, 0], plain[:, :, 0], **CLOSE)
    torch.testing.assert_close(added[:, :, 1], plain[:, :, 1] + units[:, None], **CLOSE)


def test_a_tied_head_is_ablated_as_well_when_asked() -> None:
    made, prompts, unit = gpt2(), random_prompts(5), random_units(1)[0]
    steers = [Steer(ablate=unit)] * 5
    logits, _ = gathered(resident(made, tied_head=True), prompts, steers=steers)
    without, _ = gathered(resident(made), prompts, steers=steers)
    assert not torch.allclose(logits, without, atol=1e-3)
    edited = gpt2()
    edited.transformer.wte.weight -= torch.outer(edited.transformer.wte.weight @ unit, unit)
    expected = torch.stack([steered_alone(resident(edited), tokens, steers[0]) for tokens in prompts])
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_nothing_stays_behind(model: LanguageModel) -> None:
    prompts, unit = random_prompts(3), random_units(1)[0]
    steers = [Steer(ablate=unit, add=unit, layer=0)] * 3
    before, hooks = gathered(model, prompts)[0], hooks_of(model)
    list(model.forward(prompts, steers, positions=2))
    with pytest.raises(CalibrationError):
        list(model.forward(prompts, [Steer(add=torch.zeros(HIDDEN + 1), layer=0)] * 3))
    assert hooks_of(model) == hooks
    torch.testing.assert_close(gathered(model, prompts)[0], before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_generation_is_the_naive_loop(model: LanguageModel, size: int) -> None:
    prompts = random_prompts(7, seed=2, shortest=2, longest=20)
    expected = [greedy(model.model, tokens, 8) for tokens in prompts]
    assert len({tuple(tokens) for tokens in expected}) > 4
    assert resident(model.model, size).generate(prompts, 8) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 5, "top_p": 0.9},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 8},
        {"max_length": 11},
        {"num_beams": 3},
        {"suppress_tokens": list(range(10, 60))},
        {"forced_eos_token_id": 7},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_checkpoints_own_settings_for_generation_do_not_count(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    prompts = random_prompts(3, seed=2)
    expected = [greedy(model.model, tokens, 8) for tokens in prompts]
    own = GenerationConfig(eos_token_id=END, **settings)
    monkeypatch.setattr(model.model, "generation_config", own)
    assert model.generate(prompts, 8) == expected
    assert model.model.generation_config is own


def test_completions_stop_at_every_end_token(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(8, seed=4)
    free = [greedy(model.model, tokens, 10, ends=()) for tokens in prompts]
    ends = [free[0][3], free[1][5]]
    monkeypatch.setattr(model.model, "generation_config", GenerationConfig(eos_token_id=ends))
    found = model.generate(prompts, 10)
    assert found == [greedy(model.model, tokens, 10, ends) for tokens in prompts]
    assert len(found[0]) <= 3 and not any(end in tokens for tokens in found for end in ends)
    assert found == [tokens[: next((i for i, t in enumerate(tokens) if t in ends), 10)] for tokens in free]


def test_without_end_tokens_completions_are_as_long_as_asked(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer(eos_token=None)
    mute = resident(model.model, tokenizer=tokenizer)
    monkeypatch.setattr(model.model, "generation_config", GenerationConfig())
    prompts = random_prompts(3)
    assert mute.end_tokens == ()
    assert mute.generate(prompts, 6) == [greedy(model.model, tokens, 6, ends=()) for tokens in prompts]


def test_where_end_tokens_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    made = resident(llama(layers=1), tokenizer=byte_tokenizer())
    for configured, expected in (([5, 6], (5, 6)), (7, (7,)), (0, (0,)), (None, (1,))):
        monkeypatch.setattr(made.model, "generation_config", GenerationConfig(eos_token_id=configured))
        assert made.end_tokens == expected


def test_text_of_a_completion_has_no_special_tokens() -> None:
    tokenizer = byte_tokenizer(["<|end|>"])
    made = resident(llama(layers=1), tokenizer=tokenizer)
    assert made.decode(tokenizer("<s> Hello, you \n<|end|>")["input_ids"]) == "Hello, you"


def test_positions_that_cannot_be_told() -> None:
    """An architecture that puts tokens of its own before the prompt would be read at the wrong places."""
    layer, where = nn.Identity(), torch.tensor([[1, 2], [3, 4]])
    with capture_inputs([layer], where, 8) as taken:
        layer(torch.ones(2, 5, 8))
        assert taken[0].shape == (2, 2, 8)
        for shape in ((2, 7, 8), (1, 5, 8)):
            with pytest.raises(CalibrationError, match="positions cannot be told"):
                layer(torch.ones(shape))
