import random

import pytest
import torch

from abliterate.audit.grid import has_direction
from abliterate.audit.similarity import across_categories, across_layers
from abliterate.direction.means import Directions, difference, mean_hidden
from abliterate.direction.score import refusal_score
from abliterate.progress import SILENT
from tests.resident import HIDDEN, llama, random_prompts, resident

TOKENS = list(range(10, 76))
PICK = (-2, 1)
HARMFUL, HARMLESS = random_prompts(30), random_prompts(20, seed=4)


@pytest.fixture(scope="module")
def found() -> Directions:
    model = resident(llama(), 4)
    return difference(*(mean_hidden(model, prompts, 3, 0, TOKENS) for prompts in (HARMFUL, HARMLESS)))


def test_layers_are_compared_at_one_position(found: Directions) -> None:
    table = across_layers(found, -2)
    assert len(table) == 3
    for a in range(3):
        for b in range(3):
            cosine = torch.nn.functional.cosine_similarity(found.vector(-2, a), found.vector(-2, b), dim=0)
            assert table[a][b] == pytest.approx(float(cosine), abs=1e-5)


def test_a_layer_without_a_difference_has_no_cosines(found: Directions) -> None:
    grid = found.grid.clone()
    grid[1, 0] = 1e-9
    without = Directions(grid, found.harmful, found.harmless)
    assert not has_direction(without, (-2, 0)) and has_direction(found, (-2, 0))
    table = across_layers(without, -2)
    assert table[0] == (None, None, None) and [row[0] for row in table] == [None] * 3
    assert table[1][1] == pytest.approx(1)


def test_categories_are_means_of_their_refused_prompts(found: Directions) -> None:
    model = resident(llama(), 4)
    names = ["few"] * 3 + ["b"] * 9 + ["a"] * 18
    table = across_categories(model, HARMFUL, names, found, PICK, TOKENS, True, SILENT)
    assert table is not None
    states, refused = torch.zeros(30, HIDDEN, dtype=torch.float64), []
    for row, prompt in enumerate(HARMFUL):
        batch = next(iter(model.forward([prompt], positions=3)))
        assert batch.hidden is not None
        states[row] = batch.hidden[0, 1, 1].double()
        refused.append(bool(refusal_score(batch.logits[0], TOKENS) > 0))
    rows = {name: [i for i in range(30) if names[i] == name and refused[i]] for name in ("a", "b")}
    assert table.names == ("a", "b") and table.counts == (len(rows["a"]), len(rows["b"])) and table.left_out == ("few",)
    assert min(table.counts) >= 4 and sum(table.counts) < 27, "some prompts are not refused"
    a, b = (states[rows[name]].mean(0) - found.harmless.value[1, 1] for name in ("a", "b"))
    cosine = torch.nn.functional.cosine_similarity
    assert table.cosines[0][1] == pytest.approx(float(cosine(a, b, dim=0)), abs=1e-4)
    assert table.mean == pytest.approx(table.cosines[0][1])
    assert table.to_pick[1] == pytest.approx(float(cosine(b, found.vector(*PICK).double(), dim=0)), abs=1e-4)


def test_chance_tells_categories_from_noise(found: Directions) -> None:
    """Shuffled names: no further apart than groups at random. Names by the state itself: much further."""
    model = resident(llama(), 4)
    names = ["a", "b"] * 15
    random.Random(1).shuffle(names)
    plain = across_categories(model, HARMFUL, names, found, PICK, TOKENS, False, SILENT)
    states = torch.stack([next(iter(model.forward([p], positions=2))).hidden[0, 0, 1] for p in HARMFUL])  # type: ignore[index]
    side = (states - states.mean(0)) @ torch.linalg.svd(states - states.mean(0)).Vh[0]
    split = across_categories(model, HARMFUL, ["a" if x > 0 else "b" for x in side], found, PICK, TOKENS, False, SILENT)
    assert plain is not None and split is not None
    assert plain.counts == (15, 15)
    assert split.chance - split.mean > abs(plain.chance - plain.mean) + 0.2


def test_one_category_is_nothing_to_compare(found: Directions) -> None:
    assert across_categories(resident(llama()), HARMFUL, ["a"] * 30, found, PICK, TOKENS, False, SILENT) is None
