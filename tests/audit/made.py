"""Effects and audits made by hand."""

from abliterate.audit.effects import Effect, rate_of
from abliterate.audit.grid import Grid
from abliterate.audit.halving import Dose, Window, Windows
from abliterate.audit.similarity import Categories
from abliterate.audit.spans import Span
from abliterate.audit.study import Audit


def effect(refused: int, kl: float | None = 0.1, count: int = 32, score: float = 1.0) -> Effect:
    return Effect(rate_of(refused, count), score, kl)


def audit(
    base: int = 30,
    steps: tuple[int, ...] = (1, 1, 0, 1),
    doses: tuple[tuple[float, int], ...] = ((0.25, 20), (0.5, 12), (1.0, 1)),
    window: tuple[int, int, int] | None = (1, 2, 14),
    categories: Categories | None = None,
) -> Audit:
    """Of a model with 4 layers and 2 positions, with so many of 32 prompts refused."""
    keys = ((-1, 2), (-2, 1), (-1, 1), (-2, 2), (-1, 3))[: len(steps)]
    rows = ((None, -1.0, -3.0, 2.0), (None, 1.5, -4.0, -0.5))
    grid = Grid(8, rows, ((None, 1.0, 2.0, -1.0),) * 2, ((None, 0.1, 0.2, 0.0),) * 2, 5.0, -6.0)
    smallest = Window(window[0], window[1], effect(window[2], 0.05)) if window else None
    tried = (Window(0, 0, effect(8, None, 8)), Window(1, 2, effect(3, None, 8)), Window(0, 3, effect(1, None, 8)))
    layers = ((None,) * 4, *(((None, *(1.0 if i == j else 0.5 for j in range(3)))) for i in range(3)))
    return Audit(
        pick=(-1, 2),
        base=effect(base, 0.0),
        harmless=32,
        grid=grid,
        span=Span(keys, tuple(effect(step, 0.2 + i / 10) for i, step in enumerate(steps))),
        doses=tuple(Dose(strength, effect(refused, strength / 10)) for strength, refused in doses),
        windows=Windows(effect(8, 0.0, 8, 2.0), tried, smallest),
        layers=layers,
        categories=categories,
    )


def categories(mean: float = 0.8, chance: float = 0.85) -> Categories:
    cosines = tuple(tuple(1.0 if i == j else mean for j in range(3)) for i in range(3))
    return Categories(("drugs", "fraud", "theft"), (10, 9, 8), cosines, (0.9, 0.7, 0.95), chance, ("other",))
