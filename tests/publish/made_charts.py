"""Comparisons and audit records made by hand, and a reader of pages."""

from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

from abliterate.audit.similarity import Categories
from abliterate.audit_record import Setting, audit_record
from abliterate.publish.comparison import Comparison, ComparisonRow, Estimate, mark_front
from tests.audit.made import audit

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Checks that elements are closed in order and ids are unique, and keeps tags with attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def row(name: str, refusals: float | None, kl: float | None, **changes: Any) -> ComparisonRow:
    def around(value: float | None) -> Estimate | None:
        return None if value is None else Estimate(value, value * 0.5, min(value * 1.5 + 0.01, 1.0))

    given: dict[str, Any] = {
        "over_refusals": Estimate(0.02, 0.0, 0.08), "look_alike": Estimate(0.2, 0.12, 0.31), "cross_entropy": 3.4123,
        "degenerate": 0.0, "seconds": 41.0, "certificate": "exact", "refusals_score": Estimate(0.03, 0.01, 0.1),
        "kl_answers": Estimate(0.011, 0.004, 0.02),
    }  # fmt: skip
    return ComparisonRow(name, around(refusals), kl=around(kl), **given | changes)


def comparison() -> Comparison:
    rows = [
        row("refusal", 0.016, 0.168),
        row("projected", 0.02, 0.15),
        row("norm-preserving", 0.03, 0.155),
        row("per-layer", 0.03, 0.06, certificate="not exact", claim="0.3 of the norm is left along r"),
        row("subspace", 0.0, 0.4, degenerate=0.02),
        row("search", 0.02, 0.03, certificate="holds", claim="strengths 0.2 to 1.1"),
        row("false-refusal", 0.91, 0.02, aim="over-refusal"),
    ]
    base = row("(unedited)", 0.94, 0.0, seconds=0.0, certificate="not exact")
    return Comparison("org/model", mark_front(rows), base, (("Prompts", "64 and 64"),), "abliterate compare org/model")


def record(categories: Categories | None = None, name: str = "org/model", **changes: Any) -> dict[str, Any]:
    """An audit's record, with stand-ins for what is not looked at."""
    plan = SimpleNamespace(model_type="llama", num_layers=4, hidden_size=48, inexact=None)
    source = SimpleNamespace(commit=None)
    chosen = SimpleNamespace(relaxed=False, reason="lowest bypass of 5 candidates that pass every filter")
    texts = SimpleNamespace(instructions=("a",) * 9, source="builtin:harmful_train")
    split = SimpleNamespace(train=texts, validation=texts)
    mean = SimpleNamespace(kept=8)
    found: Any = SimpleNamespace(
        selection=SimpleNamespace(choice=chosen),
        prompts=SimpleNamespace(harmful=split, harmless=split),
        directions=SimpleNamespace(harmful=mean, harmless=mean),
        refusal_tokens=SimpleNamespace(texts=("I", " Sorry")),
        chat=SimpleNamespace(
            post_instruction=(1, 2), tokenizer=SimpleNamespace(decode=lambda ids: {1: "<end>", 2: "\n"}[ids[0]])
        ),
    )
    subject: Any = SimpleNamespace(name=name, source=source, plan=plan)
    setting = Setting(subject, "refusal", f"abliterate audit {name} -o OUT", "bfloat16", categories is not None)
    return audit_record(audit(categories=categories, **changes), found, setting)
