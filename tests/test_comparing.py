"""Recipes side by side: what is shared, what is measured, and what is left when it is done or stopped."""

import json
from pathlib import Path

import pytest

from abliterate import comparing
from abliterate.comparing import compare, row_of
from abliterate.conversion import convert
from abliterate.errors import RecipeError
from abliterate.evaluation.sets import Evaluation
from abliterate.publish.comparison import Estimate
from abliterate.recipe import Recipe, load_recipe
from tests import pico
from tests.commandline import names, run_here
from tests.test_recipes_convert import QUICK


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save(tmp_path_factory.mktemp("compare") / "base", "llama", tied=True, shards=2, tokenizer=True)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("refusal", "projected", "norm-preserving", "induce", "false-refusal"):
        (folder / f"{name}.yaml").write_text(QUICK.format(name=name))
    return {path.stem: path for path in folder.iterdir()}


def chosen(recipes: dict[str, Path], *wanted: str) -> list[Recipe]:
    return [load_recipe(str(recipes[name])) for name in wanted]


def test_each_figure_has_its_place() -> None:
    figures = {
        "refusals": "refusal_rate_substring", "refusals_score": "refusal_rate_score",
        "over_refusals": "over_refusal_rate_substring", "look_alike": "look_alike_refusal_rate_substring",
        "kl": "kl_first_token", "kl_answered": "kl_first_token_answered", "kl_answers": "kl_answers",
    }  # fmt: skip
    values = {figure: 0.01 * number for number, figure in enumerate(figures.values(), 1)}
    intervals = {figure: (value - 0.005, value + 0.005) for figure, value in values.items()}
    row = row_of("refusal", Evaluation(1, 1, 1, intervals=intervals, **values), 1.0, "exact", "")
    for place, figure in figures.items():
        assert getattr(row, place) == Estimate(values[figure], *intervals[figure])


def test_figures_are_those_of_conversions(base: Path, recipes: dict[str, Path], tmp_path: Path) -> None:
    both = chosen(recipes, "refusal", "norm-preserving", "induce")
    report = compare(str(base), both, tmp_path / "report")
    assert names(tmp_path / "report") == ["comparison.html", "comparison.json", "pareto.png"]
    assert [row.recipe for row in report.comparison.rows] == ["refusal", "norm-preserving", "induce"]
    for recipe, row in zip(both, report.comparison.rows, strict=True):
        alone = convert(str(base), tmp_path / recipe.name, recipe=recipe)
        after = alone.manifest["evaluation"]["edited"]
        assert row.kl is not None and row.kl.value == after["kl_first_token"]
        assert row.refusals is not None and row.refusals.value == after["refusal_rate_substring"]
        assert row.refusals_score is not None and row.refusals_score.value == after["refusal_rate_score"]
        assert row.kl_answered is not None and row.kl_answered.value == after["kl_first_token_answered"]
        assert row.kl_answers is not None and row.kl_answers.value == after["kl_answers"]
        assert row.cross_entropy == after["cross_entropy"] and row.claim == alone.manifest["certificate"]["claim"]
    kinds = {row.recipe: (row.certificate, row.aim) for row in report.comparison.rows}
    assert kinds["refusal"] == ("exact", "refusal") and kinds["induce"] == ("holds", "induce")
    assert not next(row for row in report.comparison.rows if row.recipe == "induce").best


def test_what_recipes_share_is_computed_once(
    base: Path, recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate import find
    from abliterate.direction import screening

    means, rounds = [], []
    real, measured = find.mean_hidden, screening.ScoreSheet.measure
    monkeypatch.setattr(find, "mean_hidden", lambda *args: means.append(args[6]) or real(*args))
    monkeypatch.setattr(screening.ScoreSheet, "measure", lambda *args: rounds.append(1) or measured(*args))
    compare(str(base), chosen(recipes, "projected", "norm-preserving"), tmp_path / "report")
    assert sorted(means) == ["harmful means", "harmless means"]
    both = len(rounds)
    compare(str(base), chosen(recipes, "projected", "refusal"), tmp_path / "other")
    assert len(means) == 6 and len(rounds) == 3 * both, "these take them in different ways"


def test_a_recipe_that_finds_nothing_is_a_row_that_says_so(
    base: Path, recipes: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "strict.yaml"
    path.write_text(QUICK.format(name="refusal").replace("name: refusal", "name: strict") + "")
    path.write_text(path.read_text().replace("max_kl: 1000000.0", "max_kl: 0.0, strict: true"))
    report = compare(str(base), [*chosen(recipes, "refusal"), load_recipe(str(path))], tmp_path / "report")
    row = report.comparison.rows[1]
    assert row.recipe == "strict" and row.kl is None and row.note.startswith("not made: no direction passes")


def test_the_best_is_converted(base: Path, recipes: dict[str, Path], tmp_path: Path) -> None:
    both = chosen(recipes, "refusal", "norm-preserving")
    report = compare(str(base), both, tmp_path / "report", to_convert="best")
    best = report.comparison.best
    assert best is not None and report.converted is not None
    assert report.converted.folder == (tmp_path / "report" / best.recipe).resolve()
    assert report.converted.manifest["recipe"]["name"] == best.recipe


def test_a_comparison_that_was_stopped_goes_on(
    base: Path, recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = chosen(recipes, "refusal", "norm-preserving")
    whole = compare(str(base), both, tmp_path / "whole").comparison
    real, calls = comparing.prove, []

    def stopped(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(comparing, "prove", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(str(base), both, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    again = compare(str(base), both, tmp_path / "report").comparison
    assert len(calls) == 3, "the first recipe was measured once"

    def figures(comparison: object) -> list[object]:
        return [(row.recipe, row.kl, row.refusals, row.claim) for row in comparison.rows]  # type: ignore[attr-defined]

    assert figures(again) == figures(whole)
    assert names(tmp_path / "report") == ["comparison.html", "comparison.json", "pareto.png"]


@pytest.mark.parametrize(
    ("wanted", "to_convert", "message"),
    [
        (("refusal",), None, "two recipes or more"),
        (("refusal", "refusal"), None, "two recipes or more"),
        (("refusal", "induce"), "projected", "--convert is projected; allowed: best, refusal, induce"),
    ],
)
def test_what_cannot_be_compared(
    base: Path, recipes: dict[str, Path], tmp_path: Path, wanted: tuple[str, ...], to_convert: str | None, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        compare(str(base), chosen(recipes, *wanted), tmp_path / "report", to_convert=to_convert)
    with pytest.raises(RecipeError, match="have other prompts"):
        compare(str(base), [*chosen(recipes, "refusal"), "projected"], tmp_path / "report")
    assert not list(tmp_path.iterdir())


def test_the_command(base: Path, recipes: dict[str, Path], tmp_path: Path) -> None:
    wanted = f"{recipes['refusal']},{recipes['norm-preserving']}"
    ran = run_here("compare", base, "--recipes", wanted, "-o", tmp_path / "report", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said == json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert [row["recipe"] for row in said["rows"]] == ["refusal", "norm-preserving"]
    assert said["reproduce"].startswith("abliterate compare base --out=DIR --recipes")
    again = run_here("compare", base, "--recipes", wanted, "-o", tmp_path / "report")
    assert again.code == 1 and "report" in again.err and again.err.count("\n") == 1
