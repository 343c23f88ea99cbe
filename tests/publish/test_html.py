import re

from abliterate.publish.audit_view import audit_page
from abliterate.publish.charts import Panel, Series, line_chart
from abliterate.publish.comparison_view import comparison_page
from abliterate.publish.html import Chart, Grid, Page, Section, render_page
from tests.audit.made import categories
from tests.publish.made_charts import Reader, comparison, record

LINKS = ("src", "href", "xlink:href", "data", "action")
EVIL = """<script>alert("1")</script> & 'x' {{ 7 * 7 }} {% raw %} --> ]]> </svg></figure>"""


def chart(caption: str) -> Chart:
    return Chart(line_chart([Panel("y (nats)", [Series("a", [0, 1], [1.0, 2.0])])], "x"), caption)


def evil() -> str:
    table = Grid((EVIL, "n"), [(EVIL, "1"), ("b", "2")], EVIL, right=1, strong=frozenset({1}))
    folded = Section("", tables=[table], folded=True)
    section = Section(EVIL, [EVIL], [(EVIL, EVIL)], [chart(EVIL), chart("two")], [table])
    return render_page(Page(EVIL, EVIL, [EVIL], [section, folded], [EVIL]))


def test_texts_are_text_wherever_they_stand() -> None:
    read = Reader(evil())
    tags = [tag for tag, _ in read.tags]
    assert "script" not in tags and tags.count("svg") == 2 and tags.count("figure") == 2
    assert read.text.count(EVIL) == 16, (
        "title twice, subtitle, lead, heading, text, fact twice, captions, tables, footer"
    )
    assert [attrs["aria-label"] for tag, attrs in read.tags if tag == "svg"] == [EVIL, "two"]


def test_pages_are_well_formed_and_stand_alone() -> None:
    for page in (evil(), comparison_page(comparison()), audit_page(record(categories())), audit_page(record())):
        read = Reader(page)
        assert len(set(read.ids)) == len(read.ids)
        outside = [
            (tag, name, value)
            for tag, attrs in read.tags
            for name, value in attrs.items()
            if name in ("src", "href", "xlink:href", "data", "action")
            and not (value or "").startswith(("#", "data:image/png;base64,"))
        ]
        assert outside == [] and "@import" not in page
        assert not re.search(r"url\((?!#)", page)
        assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in read.tags}
        references = {str(attrs["xlink:href"])[1:] for tag, attrs in read.tags if tag == "use"}
        assert references | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(read.ids)


def test_charts_take_the_colours_of_the_page() -> None:
    page = evil()
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for text in svgs:
        assert "var(--ink)" in text and "var(--line)" in text and "#222221" not in text and "#fffffe" not in text
    for needed in ("prefers-color-scheme: dark", "@media print", "width=device-width", 'lang="en"', "max-width: 32rem"):
        assert needed in page


def test_same_page_same_text() -> None:
    assert evil() == evil()
    assert audit_page(record(categories())) == audit_page(record(categories()))


def test_tables_align_figures_and_set_rows_off() -> None:
    read = Reader(evil())
    cells = [attrs.get("class") for tag, attrs in read.tags if tag == "td"]
    assert cells[:4] == [None, "right", None, "right"]
    assert [attrs.get("class") for tag, attrs in read.tags if tag == "tr"][:3] == [None, None, "strong"]


def test_what_is_empty_is_left_out() -> None:
    page = render_page(Page("t", "s", [], [Section("only a title")]))
    read = Reader(page)
    assert not {"dl", "figure", "table", "details"} & {tag for tag, _ in read.tags} and 'class="lead"' not in page
