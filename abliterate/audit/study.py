"""The whole audit of a loaded model, readable top to bottom: what is measured, and in which order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from abliterate.audit.effects import Effect, effects, rate_of
from abliterate.audit.grid import Grid, measure_grid, usable_keys
from abliterate.audit.halving import Dose, Windows, search_windows, sweep_strengths
from abliterate.audit.similarity import Categories, Matrix, across_categories, across_layers
from abliterate.audit.spans import Span, leading
from abliterate.calibration.hooks import Steer
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.means import Directions
from abliterate.direction.scoring import Key, Scores, ScoreSheet, Validation
from abliterate.direction.selection import Thresholds, layer_allowed
from abliterate.errors import CalibrationError
from abliterate.progress import Progress
from abliterate.stages import Stages


@dataclass(frozen=True)
class AuditSize:
    """How much is measured.

    Attributes:
        prompts: of each validation set, for the map of the grid and the search for windows; of the harmful ones, those
            that the model refuses come first.
        directions: K, the most directions that are removed together.
    """

    prompts: int = 8
    directions: int = 8


@dataclass(frozen=True)
class Audit:
    """What was found out about one model.

    Attributes:
        pick: (position, layer) of the direction that the strengths, windows and cosines are about.
        base: the untouched model.
        harmless: validation prompts that KL is a mean over.
        layers: cosines between the directions of all layers at the picked position.
        categories: None where prompts have none.
    """

    pick: Key
    base: Effect
    harmless: int
    grid: Grid
    span: Span
    doses: tuple[Dose, ...]
    windows: Windows
    layers: Matrix
    categories: Categories | None


@dataclass(frozen=True)
class Material:
    """What is audited, and on what.

    Attributes:
        pick: (position, layer) of the direction that is audited. `unit`: that direction [hidden], at the stream's end.
        data: token ids of the validation prompts, and the refusal tokens.
        train: token ids of the harmful train prompts. `categories`: of each; None where they are not known.
        filtered: the means were taken over refused prompts alone.
    """

    directions: Directions
    pick: Key
    unit: Tensor
    data: Validation
    train: Sequence[Tokens]
    categories: Sequence[str] | None
    filtered: bool
    thresholds: Thresholds


def study(model: LanguageModel, material: Material, size: AuditSize, progress: Progress, stages: Stages) -> Audit:
    """Measures everything: categories on train prompts, all else on validation prompts.

    Raises:
        CalibrationError: the model refuses no validation prompt.
    """
    pick, unit, directions = material.pick, material.unit, material.directions
    sheet = _untouched(ScoreSheet(model, directions, material.data), progress, stages)
    data, baseline, scores = sheet.data, sheet.baseline(), _harmful_scores(sheet)
    base, few = _as_effect(scores), _as_effect(scores[: size.prompts])
    if not base.refusals.share:
        raise CalibrationError(
            f"by refusal score the model refuses none of {len(scores)} harmful validation prompts, so there is nothing "
            "to audit; use a chat model that refuses, or other --harmful prompts"
        )
    grid = measure_grid(sheet, size.prompts, progress, stages)
    span = stages.stage("span", Span, lambda: _span(sheet, material, grid, size.directions, progress))
    doses = stages.stage(
        "strengths", tuple[Dose, ...], lambda: sweep_strengths(model, unit, data, baseline, base, progress)
    )
    windows = stages.stage("windows", Windows, lambda: search_windows(model, unit, data, baseline, base, few, progress))
    alike = stages.stage("categories", Categories | None, lambda: _categories(model, material, progress))
    layers = across_layers(directions, pick[0])
    return Audit(pick, base, len(data.harmless), grid, span, doses, windows, layers, alike)


def _untouched(sheet: ScoreSheet, progress: Progress, stages: Stages) -> ScoreSheet:
    """A sheet with the baseline measured, and with the refused prompts first among the harmful ones.

    What is measured on a few prompts alone would say little on those that the model answers anyway.
    """

    def measured() -> Scores:
        sheet.baseline(progress)
        return sheet.scores()

    found = stages.stage("audit baseline", Scores, measured)
    assert found.base is not None
    logits, scores = found.base
    order = sorted(range(len(scores)), key=lambda i: scores[i] <= 0)
    data = replace(sheet.data, harmful=[sheet.data.harmful[i] for i in order])
    ordered = ScoreSheet(sheet.model, sheet.directions, data)
    ordered.restore(replace(found, base=(logits, [scores[i] for i in order])))
    return ordered


def _harmful_scores(sheet: ScoreSheet) -> list[float]:
    """Of the untouched model, one a prompt."""
    measured = sheet.scores().base
    assert measured is not None
    return measured[1]


def _as_effect(scores: Sequence[float]) -> Effect:
    return Effect(rate_of(sum(score > 0 for score in scores), len(scores)), sum(scores) / len(scores), 0.0)


def _span(sheet: ScoreSheet, material: Material, grid: Grid, most: int, progress: Progress) -> Span:
    """Refusals with the first 1, 2, ... directions removed."""
    directions, layers = sheet.directions, sheet.directions.grid.shape[1]
    allowed = [key for key in usable_keys(directions) if layer_allowed(key[1], layers, material.thresholds)]
    scored = [(key, score) for key in allowed if (score := grid.at(grid.bypass, key)) is not None]
    keys, basis = leading(directions, material.pick, scored, most)
    steers = [Steer(ablate=basis[:k]) for k in range(1, len(keys) + 1)]
    found = effects(sheet.model, steers, sheet.data, sheet.baseline(), progress, "several directions")
    return Span(tuple(keys), tuple(found))


def _categories(model: LanguageModel, material: Material, progress: Progress) -> Categories | None:
    names, tokens = material.categories, material.data.refusal_tokens
    if names is None:
        return None
    return across_categories(
        model, material.train, names, material.directions, material.pick, tokens, material.filtered, progress
    )
