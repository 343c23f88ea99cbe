"""The table of evidence, for card and terminal: which figures there are, under which names, each with its interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.evaluation.harness import Benchmark
from abliterate.evaluation.statistics import Rate, Z
from abliterate.publish.figures import MISSING, percent, significant

Figures = Mapping[str, Any]
SMALL = 0.1


@dataclass(frozen=True)
class Metric:
    """One row of evidence.

    Attributes:
        label: its name; `{kl_tokens}` in it is how many tokens the models were compared over.
        unit: "rate" (a share of prompts or tokens) or "nats" (a token).
        count: the key of the number of prompts that a rate is a share of.
    """

    key: str
    label: str
    unit: str
    count: str | None = None

    def text(self, evaluation: Figures) -> str:
        """The figure of one model with its interval: `4.7 % [1.6, 12.9]`; where that is not known, with its count."""
        value, interval = evaluation.get(self.key), _interval(evaluation.get("intervals"), self.key)
        if value is None or interval is None:
            if self.unit == "rate":
                return percent(value, evaluation.get(self.count) if self.count else None)
            return _nats(value)
        return f"{self._figure(value)}{' %' if self.unit == 'rate' else ''} {self._between(*interval)}"

    def change(self, differences: Figures) -> str:
        """What the edit changed, rates in points: `-96.9 [-100, -92.2]`."""
        found = differences.get(self.key)
        if found is None or found["value"] is None:
            return MISSING
        sign = "+" if found["value"] > 0 else ""
        return f"{sign}{self._figure(found['value'])} {self._between(found['low'], found['high'])}"

    def _figure(self, value: float) -> str:
        if self.unit != "rate":
            return _nats(value)
        text = f"{100 * value:.1f}".removesuffix(".0")
        return "0" if text == "-0" else text

    def _between(self, low: float, high: float) -> str:
        return f"[{self._figure(low)}, {self._figure(high)}]"


def _refusals(prefix: str, prompts: str, count: str) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"{prefix}_{key}", f"{prompts} refused, by {how}", "rate", count)
        for key, how in (("substring", "phrase"), ("score", "score"), ("judge", "judge"))
    )


METRICS = (
    *_refusals("refusal_rate", "harmful", "prompts_harmful"),
    *_refusals("over_refusal_rate", "harmless", "prompts_harmless"),
    *_refusals("look_alike_refusal_rate", "look-alikes", "prompts_look_alike"),
    Metric("degenerate_rate", "degenerate answers", "rate", "prompts_harmless"),
    Metric("cross_entropy", "loss on neutral text", "nats"),
    Metric("cross_entropy_answers", "loss on the base's answers", "nats"),
    Metric("kl_first_token", "KL from the base, first token", "nats"),
    Metric("kl_first_token_answered", "the same, where the base answers", "nats"),
    Metric("kl_answers", "KL from the base, {kl_tokens} tokens", "nats"),
    Metric("top1_agreement", "first token as the base's", "rate", "prompts_harmless"),
    Metric("top1_agreement_answers", "{kl_tokens} tokens as the base's", "rate"),
)
UNITS = "loss and KL in nats a token"
"""Of the figures that are no shares."""


def metric_rows(evaluations: Sequence[Figures]) -> list[tuple[Metric, str, list[str]]]:
    """Every metric that at least one of the models has a figure for, with its label and the text for each model."""
    tokens = max((each.get("kl_tokens") or 0 for each in evaluations), default=0)
    measured = [metric for metric in METRICS if any(each.get(metric.key) is not None for each in evaluations)]
    return [
        (metric, metric.label.format(kl_tokens=tokens), [metric.text(each) for each in evaluations])
        for metric in measured
    ]


def score_text(score: Benchmark) -> str:
    """A benchmark's score with its interval: `0.312 [0.287, 0.337]`; Wilson's where it is a share of documents."""
    hits = score.value * (score.samples or 0)
    if score.samples and 0 <= score.value <= 1 and math.isclose(hits, round(hits), abs_tol=1e-6):
        rate = Rate(round(hits), score.samples)
        return f"{_nats(rate.value)} [{_nats(rate.low)}, {_nats(rate.high)}]"
    if score.stderr is None:
        return _nats(score.value)
    reach = Z * score.stderr
    return f"{_nats(score.value)} [{_nats(score.value - reach)}, {_nats(score.value + reach)}]"


def caption(evaluation: Figures) -> str:
    """What stands below the table: what was measured on, and what the brackets and units are."""
    brackets = "; 95 % intervals in brackets" if has_intervals(evaluation) else ""
    judge = f", judged by {evaluation['judge']}" if evaluation.get("judge") else ""
    return f"{counts(evaluation)}, answers of up to {evaluation['max_new_tokens']} tokens{judge}; {UNITS}{brackets}"


def counts(evaluation: Figures) -> str:
    """What was measured on: `64 harmful, 64 harmless and 64 look-alike prompts`."""
    sizes = [(evaluation.get(f"prompts_{kind}") or 0, kind) for kind in ("harmful", "harmless", "look_alike")]
    named = [f"{size} {kind.replace('_', '-')}" for size, kind in sizes if size]
    return f"{', '.join(named[:-1])}{' and ' if named[:-1] else ''}{named[-1] if named else 'no'} prompts"


def has_intervals(evaluation: Figures) -> bool:
    """Whether they are known; older manifests have none."""
    return bool(evaluation.get("intervals"))


def _nats(value: float | None) -> str:
    """Three decimals, or three digits of what is small."""
    large = value is not None and math.isfinite(value) and abs(value) >= SMALL
    return f"{value:.3f}" if large else significant(value)


def _interval(intervals: Figures | None, key: str) -> tuple[float, float] | None:
    low, high = (intervals or {}).get(key) or (None, None)
    return None if low is None or high is None else (low, high)
