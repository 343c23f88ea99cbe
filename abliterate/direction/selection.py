"""The paper's selection rule, on scores alone (Arditi et al. 2024, section 2.3 and appendix C)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from abliterate.errors import SelectionError


@dataclass(frozen=True)
class Thresholds:
    """Filters of the rule.

    Attributes:
        max_layer_fraction: candidates at layers >= this share of all layers are dropped.
        max_kl: the largest mean KL (nats) on harmless prompts that an ablation may cost.
        min_induce: the smallest mean refusal score that adding the direction must reach on harmless prompts.
        strict: stop when nothing passes, instead of relaxing the KL bound.
    """

    max_layer_fraction: float = 0.8
    max_kl: float = 0.1
    min_induce: float = 0.0
    strict: bool = False


@dataclass(frozen=True)
class Candidate:
    """One direction of the grid with its scores; None where a score was not measured.

    Attributes:
        bypass: mean refusal score on harmful prompts with the direction ablated everywhere.
        induce: mean refusal score on harmless prompts with the difference of means added at its layer.
        kl: mean KL(base || ablated) in nats on harmless prompts, at the last position.
        prompts: validation prompts a score was measured on.
        status: picked, passed, screened (not every score measured), or the filter that drops it: layer, nan, induce,
            kl.
    """

    position: int
    layer: int
    bypass: float | None = None
    induce: float | None = None
    kl: float | None = None
    prompts: int = 0
    status: str = "screened"


@dataclass(frozen=True)
class Choice:
    """What the rule picks, every candidate with its status, and whether the KL bound had to be relaxed."""

    pick: Candidate
    candidates: tuple[Candidate, ...]
    relaxed: bool
    reason: str


def layer_allowed(layer: int, num_layers: int, thresholds: Thresholds) -> bool:
    """Late layers are too close to the output to mediate a behaviour: l < 0.8 L."""
    return layer < thresholds.max_layer_fraction * num_layers - 1e-9


def failed_filter(candidate: Candidate, num_layers: int, thresholds: Thresholds) -> str:
    """The first filter that drops the candidate, or "passed"."""
    if not layer_allowed(candidate.layer, num_layers, thresholds):
        return "layer"
    scores = (candidate.bypass, candidate.induce, candidate.kl)
    if any(score is None for score in scores):
        return "screened"
    bypass, induce, kl = (float(score) for score in scores if score is not None)
    if any(math.isnan(score) for score in (bypass, induce, kl)):
        return "nan"
    if induce < thresholds.min_induce:
        return "induce"
    return "kl" if kl > thresholds.max_kl else "passed"


def select(candidates: Sequence[Candidate], num_layers: int, thresholds: Thresholds) -> Choice:
    """The candidate with the lowest bypass among those that pass every filter.

    When none does, the one with the lowest KL among those that fail only the KL bound and whose bypass is below 0
    (`relaxed`); with `strict`, or when there is none of those either, nothing is picked.

    Raises:
        SelectionError: nothing can be picked; the message names the nearest candidates.
    """
    judged = [replace(c, status=failed_filter(c, num_layers, thresholds)) for c in candidates]
    passed = [c for c in judged if c.status == "passed"]
    near = [c for c in judged if c.status == "kl" and _number(c.bypass) < 0]
    if passed:
        pick, relaxed = min(passed, key=lambda c: (_number(c.bypass), c.layer, -c.position)), False
        several = f"lowest bypass of {len(passed)} candidates that pass every filter"
        reason = several if len(passed) > 1 else "the only candidate that passes every filter"
    elif near and not thresholds.strict:
        pick, relaxed = min(near, key=lambda c: (_number(c.kl), c.layer, -c.position)), True
        reason = (
            f"no candidate passes the KL bound of {thresholds.max_kl:g}; lowest KL of the {len(near)} whose bypass is "
            "below 0 and that pass every other filter"
        )
    else:
        raise SelectionError(_nothing_passes(judged, thresholds))
    final = tuple(replace(c, status="picked") if c is pick else c for c in judged)
    return Choice(replace(pick, status="picked"), final, relaxed, reason)


def _number(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _nothing_passes(candidates: Sequence[Candidate], thresholds: Thresholds) -> str:
    measured = sorted((c for c in candidates if c.kl is not None), key=lambda c: (_number(c.kl), _number(c.bypass)))
    nearest = "; ".join(
        f"({c.position}, {c.layer}) bypass {_number(c.bypass):.2f} induce {_number(c.induce):.2f} "
        f"KL {_number(c.kl):.3f} [{c.status}]"
        for c in measured[:3]
    )
    return (
        f"no direction passes (KL <= {thresholds.max_kl:g}, induce >= {thresholds.min_induce:g}, layer < "
        f"{thresholds.max_layer_fraction:g} of all); nearest: {nearest or 'none measured'}; "
        "relax a threshold in the recipe's selection section to go on"
    )
