import io
import json

import pytest
from rich.console import Console

from abliterate.audit_record import audit_bytes
from abliterate.publish.audit_verdict import verdict
from abliterate.publish.audit_view import audit_page, audit_plots, closing
from tests.audit.made import audit, categories
from tests.publish.made_charts import Reader, record


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((1, 1, 0, 1), "carries nearly all of it; removing it takes refusals (by score) from 93.8 % to 3.12 %"),
        ((12, 1), "one direction carries most of it; "),
        ((20, 16, 9), "No single direction carries refusal: "),
        ((20, 16, 9), "it takes 3 directions to halve them (28.1 % at a KL of 0.40 nats"),
        ((28, 25, 24), "Refusal is not concentrated in a few directions: "),
        ((28, 25, 24), "and removing 3 leaves 75 % at"),
    ],
)  # fmt: skip
def test_the_headline_follows_the_figures(steps: tuple[int, ...], words: str) -> None:
    assert words in verdict(audit(steps=steps))[0]


def test_what_more_directions_do() -> None:
    assert "More directions take away no more refusals: with 4 of them" in verdict(audit(steps=(1, 1, 0, 1)))[1]
    assert "Refusals stop falling at 2 directions, with 3.12 %" in verdict(audit(steps=(12, 1, 1)))[1]
    assert not any("directions take away" in sentence for sentence in verdict(audit(steps=(1,))))


def test_the_smallest_edits() -> None:
    said = "\n".join(verdict(audit()))
    assert "Removing 50 % of that direction is enough to halve refusals, to 37.5 % at a KL of 0.050 nats" in said
    assert "So is removing all of it in layers 1 to 2 alone, of 4 layers: 43.8 %" in said
    assert "in layer 2 alone" in "\n".join(verdict(audit(window=(2, 2, 3))))
    none = "\n".join(verdict(audit(doses=((0.5, 25), (1.0, 20)), window=None)))
    assert "No share of that direction halves refusals, not even all of it." in none
    assert "in some of the 4 layers alone was not enough" in none


def test_places_and_categories() -> None:
    assert "At 4 of 6 (position, layer) places" in "\n".join(verdict(audit()))
    for mean, words in (
        (0.8, "the same direction for every"),
        (0.6, "share much of"),
        (0.1, "directions of their own"),
    ):
        said = verdict(audit(categories=categories(mean)))[-1]
        assert words in said and f"a cosine of {mean:.2f}" in said and "0.85 between groups" in said
        assert "furthest from the picked direction is fraud (0.70)" in said


def test_the_record_says_everything_in_json() -> None:
    made = record(categories())
    content = audit_bytes(made)
    assert json.loads(content) == made and content.endswith(b"}\n") and made["schema"] == "abliteration-audit/1"
    assert made["verdict"] == verdict(audit(categories=categories()))
    assert made["directions"]["enough"] == 1 and len(made["directions"]["steps"]) == 4
    assert made["strengths"]["halving"]["strength"] == 0.5 and made["windows"]["halving"]["first"] == 1
    assert made["grid"]["bypass"][0] == [None, -1.0, -3.0, 2.0] and made["base"]["prompts"] == 32
    assert made["categories"]["left_out"] == ["other"] and any("other" in note for note in made["notes"])
    without = record()
    assert without["categories"] is None and any("not every harmful prompt has" in note for note in without["notes"])


def test_no_path_of_the_machine_is_in_it() -> None:
    made = record(name="/home/me/models/secret")
    assert "/home" not in audit_bytes(made).decode() and made["model"]["id"] == "secret"


def test_every_figure_is_on_the_page() -> None:
    read = Reader(audit_page(record(categories(), name="org/<b>")))
    assert "How concentrated is refusal in org/<b>?" in read.text
    for needed in ("93.8 %", "position -1", "50 %", "layers 1 to 2", "drugs", "8 of 9 harmful"):
        assert needed in read.text, needed
    assert sum(tag == "svg" for tag, _ in read.tags) == 7
    assert sum(tag == "svg" for tag, _ in Reader(audit_page(record())).tags) == 6


def test_plots() -> None:
    plots = audit_plots(record(categories()))
    assert set(plots) == {
        f"{name}.png" for name in ("directions", "strength", "windows", "map", "layers", "similarity", "categories")
    }
    assert all(content[1:4] == b"PNG" for content in plots.values())


def test_the_terminal_table() -> None:
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False, emoji=False)
    console.print(closing(record(), "out"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in text.splitlines())
    for needed in ("nothing", "93.8 %", "80 to 98 %", "2 directions", "4 directions", "50 % of the", "wrote out"):
        assert needed in text, needed
