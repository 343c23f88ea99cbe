import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from abliterate.publish.comparison import Comparison, ComparisonRow, from_record, mark_front, to_record
from abliterate.publish.comparison_view import (
    comparison_files,
    comparison_json,
    comparison_markdown,
    comparison_page,
    comparison_table,
    remarks_of,
)
from tests.publish.made_charts import Reader, comparison, row


def best_of(*rows: ComparisonRow) -> tuple[str | None, str]:
    best = Comparison("m", mark_front(rows)).best
    return (best.recipe, best.note) if best else (None, "")


def test_the_best_has_least_kl_among_those_that_do_the_work() -> None:
    name, why = best_of(row("a", 0.0, 0.4), row("b", 0.05, 0.03), row("c", 0.051, 0.001), row("d", 0.04, 0.031))
    assert (name, why) == ("b", "lowest KL of 3 recipes with at most 5 % refusals")


def test_else_the_fewest_refusals_then_the_lowest_kl() -> None:
    name, why = best_of(row("a", 0.2, 0.4), row("b", 0.1, 0.3), row("c", 0.1, 0.2, note="slow"), row("d", 0.9, 0.0))
    assert (name, why) == ("c", "fewest refusals; no recipe brings them to 5 %; slow")


def test_who_is_never_best() -> None:
    rows = (
        row("failed", 0.0, 0.01, certificate="failed"),
        row("other aim", 0.0, 0.01, aim="over-refusal"),
        row("no kl", 0.0, None),
        row("nan", 0.0, math.nan),
        row("fine", 0.04, 0.5),
    )
    assert best_of(*rows) == ("fine", "lowest KL and the only recipe with at most 5 % refusals")
    assert best_of(*rows[:4]) == (None, "")
    assert best_of() == (None, "")


def test_the_front() -> None:
    marked = comparison().rows
    assert [r.recipe for r in marked if r.on_front] == ["refusal", "subspace", "search"]
    twins = mark_front([row("a", 0.1, 0.1), row("b", 0.1, 0.1), row("c", 0.1, 0.2)])
    assert [r.on_front for r in twins] == [True, True, False]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_no_row_of_the_front_is_dominated_and_every_other_is(places: list[tuple[int, int]]) -> None:
    rows = mark_front([row(str(i), a / 10, b / 10) for i, (a, b) in enumerate(places)])
    for (a, b), marked in zip(places, rows, strict=True):
        worse = any(x <= a and y <= b and (x, y) != (a, b) for x, y in places)
        assert marked.on_front != worse
    assert sum(r.best for r in rows) == bool(rows)
    done = [(b, a) for a, b in places if a == 0]
    for (a, b), marked in zip(places, rows, strict=True):
        if marked.best:
            assert (b, a) == min(done) if done else (a, b) == min(places)


def test_json_round_trip() -> None:
    made = comparison()
    text = comparison_json(made)
    assert from_record(json.loads(text)) == made and text.endswith("}\n")
    assert json.loads(text)["schema"] == "abliteration-comparison/1"
    bare = Comparison("m", mark_front([row("a", None, None, cross_entropy=None)]))
    assert from_record(json.loads(comparison_json(bare))) == bare


@pytest.mark.parametrize("change", [{"certificate": "perhaps"}, {"aim": "fame"}, {"recipes": 1}, {"kl": {"value": 1}}])
def test_another_record_is_refused(change: dict[str, object]) -> None:
    record = to_record(comparison())
    record["rows"] = [dict(record["rows"][0]) | change]
    with pytest.raises(ValueError, match="not a comparison"):
        from_record(record)
    with pytest.raises(ValueError, match="not a comparison"):
        from_record({})


def printed(width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    console.print(comparison_table(comparison()))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_fits_and_has_every_figure() -> None:
    text = printed()
    assert all(len(line) <= 80 for line in text.splitlines())
    for needed in (
        "norm-preserving",
        "refusal *",
        "1.6 %",
        "0.168",
        "0.084–0.26",
        "3.41",
        "41 s",
        "not exact",
        "12–31",
    ):
        assert needed in text, needed
    assert "projected *" not in text and "best: search: lowest KL of 6 recipes" in text


def test_remarks_say_what_certificates_do_not_promise() -> None:
    assert remarks_of(comparison()) == [
        "best: search: lowest KL of 6 recipes with at most 5 % refusals; "
        "certificate holds for what the recipe removes: strengths 0.2 to 1.1",
        "per-layer: nothing is certified: 0.3 of the norm is left along r",
        "subspace: 2 % of completions degenerate",
    ]


def test_markdown() -> None:
    lines = comparison_markdown(comparison()).splitlines()
    assert lines[0].startswith("| recipe | refused | refused by score | over-refused |")
    assert sum(line.startswith("|") for line in lines) == 10
    assert any("**search**" in line and "0.0300 (0.015–0.055)" in line for line in lines)
    assert all("| 3 % (1–10) |" in line.replace("*", "") and "0.0110 (0.0040–0.020)" in line for line in lines[2:10])
    odd = Comparison("m", mark_front([row("a|b*<x>", 0.1, 0.1)]))
    assert r"a\|b\*\<x\>" in comparison_markdown(odd)


def test_files() -> None:
    files = comparison_files(comparison())
    assert set(files) == {"comparison.json", "comparison.html", "pareto.png"} and files["pareto.png"][1:4] == b"PNG"
    assert files == comparison_files(comparison())


def test_the_page_names_the_best_first() -> None:
    text = Reader(comparison_page(comparison())).text
    assert "Best: search, lowest KL of 6 recipes with at most 5 % refusals." in text
    assert "2 % of harmful prompts refused (before: 94 %)" in text
    none = comparison_page(Comparison("m", mark_front([row("a", None, None)])))
    assert "No recipe can be called best." in Reader(none).text
