"""The audit in plain sentences, worded from its figures."""

from abliterate.audit.effects import Effect
from abliterate.audit.halving import smallest_dose
from abliterate.audit.study import Audit
from abliterate.publish.figures import percent, significant

NEARLY_ALL, MOST = 0.1, 0.5
"""Shares of the base's refusals that may be left."""
_ALIKE, _UNLIKE = 0.9, 0.7
_NEAR_CHANCE = 0.1
_PLAINLY_FEWER = 0.15


def verdict(audit: Audit) -> list[str]:
    """The most important sentence first."""
    sentences = [_headline(audit), _more(audit), _half(audit), _window(audit), _places(audit), _categories(audit)]
    return [sentence for sentence in sentences if sentence]


def _headline(audit: Audit) -> str:
    one, before = audit.span.effects[0], audit.base.refusals
    change = f"removing it takes refusals (by score) from {percent(before.share)} to {_cost(one)}"
    left = one.refusals.share / before.share
    if left <= NEARLY_ALL:
        return f"Refusal is concentrated: one direction carries nearly all of it; {change}."
    if left <= MOST:
        return f"Refusal is concentrated: one direction carries most of it; {change}."
    halved = next((k for k, e in enumerate(audit.span.effects, 1) if e.refusals.share <= MOST * before.share), None)
    if halved is not None:
        several = audit.span.effects[halved - 1]
        return (
            f"No single direction carries refusal: {change}; it takes {halved} directions to halve them "
            f"({_cost(several)})."
        )
    return (
        f"Refusal is not concentrated in a few directions: {change}, and removing {len(audit.span.effects)} leaves "
        f"{_cost(audit.span.effects[-1])}."
    )


def _cost(effect: Effect) -> str:
    return f"{percent(effect.refusals.share)} at a KL of {significant(effect.kl, 2)} nats on harmless prompts"


def _more(audit: Audit) -> str:
    steps, enough = audit.span.effects, audit.span.enough
    if len(steps) == 1:
        return ""
    last = f"with {len(steps)} of them removed it is {_cost(steps[-1])}"
    if enough == 1:
        return f"More directions take away no more refusals: {last}."
    return f"Refusals stop falling at {enough} directions, with {_cost(steps[enough - 1])}; {last}."


def _half(audit: Audit) -> str:
    dose = smallest_dose(audit.doses, audit.base)
    if dose is None:
        return "No share of that direction halves refusals, not even all of it."
    return f"Removing {percent(dose.strength)} of that direction is enough to halve refusals, to {_cost(dose.effect)}."


def _window(audit: Audit) -> str:
    window, layers = audit.windows.smallest, len(audit.layers)
    if window is None or window.width == layers:
        return f"Removing it in some of the {layers} layers alone was not enough to halve them, wherever it was tried."
    where = f"layer {window.first}" if window.width == 1 else f"layers {window.first} to {window.last}"
    return f"So is removing all of it in {where} alone, of {layers} layers: {_cost(window.effect)}."


def _places(audit: Audit) -> str:
    scores = [score for row in audit.grid.bypass for score in row if score is not None]
    flipped = sum(score < 0 for score in scores)
    return (
        f"At {flipped} of {len(scores)} (position, layer) places the direction found there, removed by itself, brings "
        "the mean refusal score of harmful prompts below 0."
    )


def _categories(audit: Audit) -> str:
    found = audit.categories
    if found is None:
        return ""
    mean, chance = found.mean, found.chance
    lowest = min(range(len(found.names)), key=lambda i: found.to_pick[i])
    figures = (
        f"a cosine of {mean:.2f} between the directions of two of {len(found.names)} categories, {chance:.2f} between "
        f"groups of as many prompts drawn at random; furthest from the picked direction is {found.names[lowest]} "
        f"({found.to_pick[lowest]:.2f})"
    )
    if chance - mean <= _NEAR_CHANCE:
        return f"It is the same direction for every category of harmful prompts: {figures}."
    if chance - mean <= 3 * _NEAR_CHANCE:
        return f"Categories of harmful prompts share much of the direction: {figures}."
    return f"Categories of harmful prompts have directions of their own: {figures}."
