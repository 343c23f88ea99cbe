"""The stream of a pico Llama, measured beside hooks of the test's own."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abliterate.certify.stream import StreamResidual, joined, measure_stream
from tests.resident import HIDDEN, VOCABULARY, llama, random_prompts, random_units, resident, writers_of

LAYERS, TOLERANCE = 3, 1e-6
PROMPTS = random_prompts(7)
R = random_units(1)[0]


def ablate(model: Any, r: Tensor, spare: Sequence[str] = ()) -> Any:
    """Every writer edited by hand, in fp64, but for the spared ones."""
    unit = r.double() / r.double().norm()
    for name, module in writers_of(model).items():
        if name in spare:
            continue
        (weight,) = module.parameters()
        w = weight.data.double()
        along = isinstance(module, nn.Embedding)
        w = w - torch.outer(w @ unit, unit) if along else w - torch.outer(unit, unit @ w)
        weight.data.copy_(w)
    return model


def ratios(model: Any, prompts: Sequence[Sequence[int]], r: Tensor) -> dict[str, float]:
    """max abs(h.r)/norm(h), one prompt at a time and so without padding, by module; layers by their number."""
    found: dict[str, list[Tensor]] = {}

    def look(name: str, h: Tensor) -> None:
        h = h.double()
        found.setdefault(name, []).append(((h @ r.double()).abs() / h.norm(dim=-1)).max())

    handles = [
        module.register_forward_hook(lambda m, a, o, n=name: look(n, o)) for name, module in writers_of(model).items()
    ]
    for i, layer in enumerate(model.model.layers):
        handles.append(
            layer.register_forward_pre_hook(
                lambda m, a, k, i=i: look(str(i), a[0] if a else k["hidden_states"]), with_kwargs=True
            )
        )
    handles.append(model.model.norm.register_forward_pre_hook(lambda m, a: look(str(len(model.model.layers)), a[0])))
    for prompt in prompts:
        model(torch.tensor([list(prompt)]))
    for handle in handles:
        handle.remove()
    return {name: float(torch.stack(values).max()) for name, values in found.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_measurement_is_that_of_plain_hooks(batch_size: int) -> None:
    model = llama(layers=LAYERS)
    measured, expected = measure_stream(resident(model, batch_size), PROMPTS, R), ratios(model, PROMPTS, R)
    assert len(measured.layers) == LAYERS + 1 and measured.tokens == sum(map(len, PROMPTS))
    for i, value in enumerate(measured.layers):
        assert value == pytest.approx(expected[str(i)], rel=1e-4)
    assert list(measured.writers) == list(writers_of(model))
    for name, value in measured.writers.items():
        assert value == pytest.approx(expected[name], rel=1e-4)
    assert measured.worst == pytest.approx(max(measured.layers)) and measured.worst > 0.3


def test_padding_is_not_looked_at() -> None:
    """Padding is token 0; its embedding is made the loudest of all along r."""
    model = ablate(llama(layers=LAYERS), R)
    prompts = [[5, 6], [7, 8, 9, 10, 11, 12]]
    model.model.embed_tokens.weight.data[0] = 100 * R
    assert measure_stream(resident(model, 2), prompts, R).worst < TOLERANCE
    assert measure_stream(resident(model, 2), [[0, 6], prompts[1]], R).worst > 0.9


def test_an_edited_model_holds() -> None:
    measured = measure_stream(resident(ablate(llama(layers=LAYERS), R)), PROMPTS, R)
    assert measured.holds(TOLERANCE) and measured.first_failure(TOLERANCE) is None
    assert max(measured.writers.values()) < TOLERANCE


@pytest.mark.parametrize("spared", list(writers_of(llama(layers=LAYERS))))
def test_the_writer_that_puts_it_back_is_named(spared: str) -> None:
    measured = measure_stream(resident(ablate(llama(layers=LAYERS), R, [spared])), PROMPTS, R)
    layer = next((int(part) + 1 for part in spared.split(".") if part.isdigit()), 0)
    where = "the final norm's input" if layer == LAYERS else f"the input of layer {layer}"
    assert not measured.holds(TOLERANCE)
    assert measured.first_failure(TOLERANCE) == f"{where}, written by {spared}"
    assert {name for name, value in measured.writers.items() if not value <= TOLERANCE} == {spared}
    assert all((value <= TOLERANCE) == (i < layer) for i, value in enumerate(measured.layers))


def test_a_module_that_is_no_known_writer_is_reported_as_such() -> None:
    model = ablate(llama(layers=LAYERS), R)
    held = resident(model)
    handle = model.model.layers[1].register_forward_hook(lambda m, a, o: o + R)
    found = measure_stream(held, PROMPTS, R).first_failure(TOLERANCE)
    handle.remove()
    assert found == "the input of layer 2, through a module that is not a known writer of layer 1"


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_nan_wins_wherever_it_comes(place: int, batch_size: int) -> None:
    model = ablate(llama(layers=LAYERS), R)
    model.model.embed_tokens.weight.data[VOCABULARY - 1] = math.nan
    clean = [[token % (VOCABULARY - 5) for token in prompt] for prompt in PROMPTS]
    assert measure_stream(resident(model, batch_size), clean, R).holds(TOLERANCE)
    clean[place] = [*clean[place][:2], VOCABULARY - 1, *clean[place][2:]]
    measured = measure_stream(resident(model, batch_size), clean, R)
    assert all(map(math.isnan, measured.layers)) and math.isnan(measured.worst)
    assert not measured.holds(TOLERANCE) and not measured.holds(math.inf)
    assert measured.first_failure(TOLERANCE) == "the input of layer 0, written by model.embed_tokens"


def test_without_prompts_nothing_is_proved() -> None:
    measured = measure_stream(resident(ablate(llama(layers=LAYERS), R)), [], R)
    assert measured.tokens == 0 and not measured.holds(TOLERANCE)


def test_the_model_is_left_without_hooks_and_computes_as_before() -> None:
    model = llama(layers=LAYERS)
    tokens = torch.tensor([PROMPTS[0]])
    before = model(tokens).logits
    measure_stream(resident(model), PROMPTS, R)
    assert torch.equal(model(tokens).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_zero_vector_in_the_stream_has_no_direction() -> None:
    model = llama(layers=LAYERS)
    for module in writers_of(model).values():
        for weight in module.parameters():
            weight.data.zero_()
    assert measure_stream(resident(model), PROMPTS, R) == StreamResidual(
        (0.0,) * (LAYERS + 1), sum(map(len, PROMPTS)), dict.fromkeys(writers_of(model), 0.0)
    )
    assert len(R) == HIDDEN


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_direction_that_turns_is_looked_for_where_it_points(batch_size: int) -> None:
    model, pulled = llama(layers=LAYERS), random_units(LAYERS + 1, seed=3)
    measured = measure_stream(resident(model, batch_size), PROMPTS, R, pulled=pulled.double())
    for i, (value, r) in enumerate(zip(measured.layers, pulled, strict=True)):
        assert value == pytest.approx(ratios(model, PROMPTS, r)[str(i)], rel=1e-4)
    assert list(measured.writers) == list(writers_of(model))
    assert set(measured.writers.values()) == {0.0}, "what a writer puts out has another direction than the stream"


def test_a_direction_that_stays_is_measured_as_before() -> None:
    model = llama(layers=LAYERS)
    plain = measure_stream(resident(model), PROMPTS, R)
    turned = measure_stream(resident(model), PROMPTS, R, pulled=R.expand(LAYERS + 1, -1))
    assert turned.layers == plain.layers and plain.writers != turned.writers


@pytest.mark.parametrize("spared", [0, 1, LAYERS])
def test_where_a_turned_direction_is_left_is_said_without_a_name(spared: int) -> None:
    """The stream is clean along R alone; where another direction counts, it shows."""
    model = ablate(llama(layers=LAYERS), R)
    pulled = R.repeat(LAYERS + 1, 1)
    assert measure_stream(resident(model), PROMPTS, R, pulled=pulled).holds(TOLERANCE)
    pulled[spared] = random_units(1, seed=5)[0]
    measured = measure_stream(resident(model), PROMPTS, R, pulled=pulled)
    assert [i for i, value in enumerate(measured.layers) if not value <= TOLERANCE] == [spared]
    failure = measured.first_failure(TOLERANCE)
    assert failure is not None and "a module that is not a known" in failure


@pytest.mark.parametrize("absent", [0, 1, LAYERS - 1])
def test_a_layer_that_waits_for_an_image(absent: int) -> None:
    """Text goes by it: nothing comes into it, and what comes into the next is what would have."""
    model = llama(layers=LAYERS)
    held = resident(model)
    model.model.layers = nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i != absent)
    waiting = replace(held, stream=replace(held.stream, sometimes=frozenset({absent})))
    measured = measure_stream(waiting, PROMPTS, R)
    assert all(math.isfinite(value) for value in measured.layers)
    assert measured.layers[absent] == measured.layers[absent + 1]
    expected = ratios(model, PROMPTS, R)
    others = [value for i, value in enumerate(measured.layers) if i != absent]
    assert others == pytest.approx([expected[str(i)] for i in range(LAYERS)], rel=1e-4)
    assert not measure_stream(held, PROMPTS, R).holds(math.inf), "not proved where it was not said"


def test_the_larger_of_two_measurements_counts_and_nan_wins() -> None:
    first = StreamResidual((0.1, 0.3), 5, {"a": 0.1, "b": 0.4})
    second = StreamResidual((0.2, math.nan), 7, {"a": math.nan, "b": 0.2})
    both = joined(first, second)
    assert both.layers[0] == pytest.approx(0.2) and math.isnan(both.layers[1]) and math.isnan(both.worst)
    assert both.tokens == 12 and math.isnan(both.writers["a"]) and both.writers["b"] == pytest.approx(0.4)
