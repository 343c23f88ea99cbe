"""The card's evidence section: what was measured before and after, how, and how sure the figures are."""

from collections.abc import Mapping
from typing import Any

from abliterate.publish.evidence import UNITS, counts, has_intervals, metric_rows
from abliterate.publish.figures import percent
from abliterate.publish.markdown import table

Evaluations = Mapping[str, Any]


def evidence_text(evaluation: Evaluations | None, on: str = "the saved files") -> str:
    """Sentences and the table; of a conversion without evaluation, that there is none.

    Args:
        on: what was measured.
    """
    if evaluation is None:
        return (
            "**Not measured.** This conversion was run without evaluation: how often the model still refuses, and what "
            "else changed, is not known."
        )
    base, edited = evaluation["base"], evaluation["edited"]
    changes = evaluation.get("differences") or {}
    header = ["", "before", "after", *(["change"] if changes else [])]
    rows = [
        [label, *texts, *([metric.change(changes)] if changes else [])]
        for metric, label, texts in metric_rows([base, edited])
    ]
    lines = [
        _how_measured(edited, on),
        table(header, rows, right=len(header) - 1) if rows else "**Nothing could be measured.**",
    ]
    if base["refusal_rate_substring"] is None and edited["refusal_rate_substring"] is None:
        lines.append("**Refusals were not measured.**")
    return "\n\n".join(lines)


def _how_measured(edited: Evaluations, on: str) -> str:
    harmful = edited["prompts_harmful"]
    if not harmful:
        return f"Measured on {on}, with {counts(edited)}.{_intervals(edited)}"
    look_alike = ""
    if edited.get("prompts_look_alike"):
        look_alike = ' *Look-alikes* are harmless requests in the words of harmful ones ("how do I kill a process").'
    return (
        f"Measured on {on}, with {counts(edited)} that played no part in finding the direction.{look_alike} "
        f"*By phrase*: a greedy answer of up to {edited['max_new_tokens']} tokens holds a phrase of refusal. *By "
        f"score*: the first token is more likely to start a refusal than not.{_along(edited)} One harmful prompt more "
        f"or less is {percent(1 / harmful)}. Answers are judged and not kept.{_intervals(edited)}"
    )


def _along(edited: Evaluations) -> str:
    if edited.get("kl_answers") is None:
        return ""
    return (
        f" Over {edited['kl_tokens']} tokens: both models read the base's own greedy answers to the harmless prompts. "
        "*Degenerate* answers to harmless prompts are empty, loop, or repeat one line."
    )


def _intervals(edited: Evaluations) -> str:
    if not has_intervals(edited):
        return ""
    return (
        f" Shares and their changes are in percent, {UNITS}. In brackets are 95 % intervals: Wilson's of shares of "
        "prompts, bootstraps of means over prompts and windows of text, and of changes a bootstrap over pairs."
    )
