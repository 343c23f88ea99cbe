import pytest
import torch

from abliterate.audit.spans import NEW, Span, leading
from abliterate.direction.means import Directions, Mean
from tests.audit.made import effect

HIDDEN = 6


def directions(*rows: list[float]) -> Directions:
    """One position, a layer a row."""
    grid = torch.tensor([rows])
    mean = Mean(grid.double(), 9, 9)
    return Directions(grid, mean, mean)


GRID = directions([3, 0, 0, 0, 0, 0], [5, 0.1, 0, 0, 0, 0], [0, 0, 2, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 1, 4, 0, 0])


def test_the_pick_comes_first_then_the_best_that_are_not_in_the_span() -> None:
    scores = [((-1, layer), score) for layer, score in enumerate([1.0, -9.0, -3.0, -5.0, 2.0])]
    keys, basis = leading(GRID, (-1, 0), scores, 8)
    assert keys == [(-1, 0), (-1, 3), (-1, 4)], "layer 1 is layer 0 again, layer 2 lies in the span of 0 and 3"
    torch.testing.assert_close(basis @ basis.T, torch.eye(3))
    assert torch.equal(basis[0], GRID.unit(-1, 0))
    for k, key in enumerate(keys, 1):
        unit = GRID.unit(*key)
        torch.testing.assert_close((basis[:k] @ unit) @ basis[:k], unit)
    assert leading(GRID, (-1, 0), scores, 2)[0] == keys[:2]


def test_scores_that_are_not_numbers_are_left_out() -> None:
    keys, _ = leading(GRID, (-1, 0), [((-1, 4), float("nan")), ((-1, 3), 1.0)], 8)
    assert keys == [(-1, 0), (-1, 3)]


@pytest.mark.parametrize(("cosine", "joins"), [(0.94, True), (0.97, False)])
def test_what_is_new_enough(cosine: float, joins: bool) -> None:
    sine = (1 - cosine**2) ** 0.5
    assert (sine >= NEW) == joins
    keys, _ = leading(directions([1, 0, 0, 0, 0, 0], [cosine, sine, 0, 0, 0, 0]), (-1, 0), [((-1, 1), -1.0)], 8)
    assert (len(keys) == 2) == joins


@pytest.mark.parametrize(
    ("left", "enough"), [((3, 1, 0, 0), 2), ((1, 0, 0), 1), ((20, 10, 5, 2), 4), ((5, 5, 5), 1), ((9, 3, 4, 3), 2)]
)
def test_refusals_stop_falling(left: tuple[int, ...], enough: int) -> None:
    assert Span(((-1, 0),) * len(left), tuple(map(effect, left))).enough == enough
