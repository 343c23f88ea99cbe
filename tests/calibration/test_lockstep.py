"""Passes in lock step, on toy layers: who runs when, and what is left when something goes wrong."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from greenlet import getcurrent
from torch import Tensor, nn

from abliterate.calibration.hooks import on_output
from abliterate.calibration.lockstep import Layer, lockstep


class Adds(nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: Tensor) -> Tensor:
        return x + self.amount


class Shelf:
    """Weights that write down what is asked of them."""

    def __init__(self, count: int) -> None:
        self.layers: Sequence[nn.Module] = [Adds(10.0**i) for i in range(count)]
        self.log: list[str] = []
        self.inside: set[int] = set()

    def load(self, index: int) -> None:
        self.log.append(f"+{index}")
        self.inside.add(index)

    def release(self, index: int) -> None:
        self.log.append(f"-{index}")
        self.inside.remove(index)


def through(shelf: Shelf, start: float, route: Sequence[int], log: list[str] | None = None) -> Callable[[], float]:
    def call() -> float:
        x = torch.tensor([start])
        for index in route:
            x = shelf.layers[index](x)
            assert shelf.inside == {index}, "no other layer is in memory, and this one is"
            if log is not None:
                log.append(f"{start:g}@{index}")
        return float(x)

    return call


def test_each_layer_is_loaded_once_for_all() -> None:
    shelf, log = Shelf(3), list[str]()
    found = list(lockstep(shelf, [through(shelf, start, range(3), log) for start in (1.0, 2.0)]))
    assert found == [(0, 112.0), (1, 113.0)]
    assert shelf.log == ["+0", "-0", "+1", "-1", "+2", "-2"]
    assert log == ["1@0", "2@0", "1@1", "2@1", "1@2", "2@2"]


def test_passes_may_take_different_ways() -> None:
    shelf = Shelf(4)
    routes = [(0, 1, 2, 3), (0, 2, 3), (3,), (), (0, 1, 0, 1), (2, 2)]
    found = dict(lockstep(shelf, [through(shelf, 0.0, route) for route in routes]))
    assert found == {n: sum(10.0**i for i in route) for n, route in enumerate(routes)}
    assert not shelf.inside


def test_completions_of_different_lengths_share_their_steps() -> None:
    shelf = Shelf(2)
    found = dict(lockstep(shelf, [through(shelf, 0.0, (0, 1) * steps) for steps in (1, 3, 2)]))
    assert found == {0: 11.0, 1: 33.0, 2: 22.0}
    assert shelf.log.count("+0") == shelf.log.count("+1") == 3


def test_a_hook_acts_on_the_pass_that_set_it() -> None:
    shelf = Shelf(2)

    def steered(factor: float) -> float:
        with on_output(shelf.layers, lambda hidden: hidden * factor):
            return float(shelf.layers[1](shelf.layers[0](torch.tensor([1.0]))))

    found = dict(lockstep(shelf, [lambda: steered(2.0), through(shelf, 1.0, (0, 1)), lambda: steered(3.0)]))
    assert found == {0: (2 * 2 + 10) * 2, 1: 12.0, 2: (2 * 3 + 10) * 3}


def test_passes_run_without_gradients_unless_they_are_asked_for() -> None:
    shelf = Shelf(1)

    def modes() -> tuple[bool, bool]:
        shelf.layers[0](torch.zeros(1))
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    for gradients in (False, True):
        for _, (inference, grad) in lockstep(shelf, [modes, modes], gradients=gradients):
            assert (inference, grad) == (not gradients, gradients)
            assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled(), "as before"


def test_an_error_in_one_pass_ends_all_and_leaves_nothing() -> None:
    shelf, ended = Shelf(3), list[str]()

    def fails() -> None:
        shelf.layers[0](torch.zeros(1))
        raise ValueError("of the model's code")

    def waits() -> None:
        try:
            shelf.layers[0](shelf.layers[1](torch.zeros(1)))
        finally:
            ended.append("cleaned up")

    with pytest.raises(ValueError, match="of the model's code"):
        list(lockstep(shelf, [waits, fails, waits]))
    assert ended == ["cleaned up"] * 2 and not shelf.inside
    assert all("forward" not in vars(layer) for layer in shelf.layers)


@pytest.mark.parametrize("gradients", [False, True])
def test_modes_of_passes_that_are_ended_do_not_stay(gradients: bool) -> None:
    """As `generate` of transformers is under way in `no_grad`."""
    shelf = Shelf(2)

    def waits() -> None:
        with torch.no_grad():
            shelf.layers[1](shelf.layers[0](torch.zeros(1)))

    def fails() -> None:
        raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        list(lockstep(shelf, [waits, fails], gradients=gradients))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_layer_that_cannot_be_loaded_ends_all() -> None:
    class Broken(Shelf):
        def load(self, index: int) -> None:
            if index == 1:
                raise OSError("the disk is gone")
            super().load(index)

    shelf = Broken(2)
    with pytest.raises(OSError, match="the disk is gone"):
        list(lockstep(shelf, [through(shelf, 1.0, (0, 1))] * 3))
    assert not shelf.inside and all("forward" not in vars(layer) for layer in shelf.layers)


def test_stopping_early_cleans_up() -> None:
    shelf, ended = Shelf(2), list[int]()

    def call(number: int) -> int:
        try:
            shelf.layers[1](shelf.layers[0](torch.zeros(1)))
        finally:
            ended.append(number)
        return number

    runs: Iterator[Any] = lockstep(shelf, [lambda n=n: call(n) for n in range(4)])  # type: ignore[misc]
    assert next(runs) == (0, 0)
    runs.close()  # type: ignore[attr-defined]
    assert sorted(ended) == [0, 1, 2, 3] and not shelf.inside
    assert all("forward" not in vars(layer) for layer in shelf.layers)


def test_something_else_may_run_in_place_of_a_layer() -> None:
    class Twice(Layer):
        def __call__(self, index: int, forward: Any, args: Any, kwargs: Any) -> Any:
            assert getcurrent().parent is not None
            return forward(forward(*args, **kwargs))

    shelf = Shelf(2)
    assert list(lockstep(shelf, [through(shelf, 0.0, (0, 1))], Twice())) == [(0, 22.0)]


def test_no_calls() -> None:
    assert list(lockstep(Shelf(2), [])) == []
