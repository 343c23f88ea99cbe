"""The smallest edits that halve refusal: a share of the direction everywhere, or all of it in a few layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from abliterate.audit.effects import Effect, effects
from abliterate.calibration.hooks import Steer
from abliterate.calibration.model import LanguageModel
from abliterate.direction.scoring import Validation
from abliterate.progress import Progress

_COARSE = tuple(step / 8 for step in range(1, 9))
_FINE = 4
"""Parts that the step in which the rate falls to a half is divided into."""
_CONFIRMED = 12
"""Windows that are measured on every prompt."""


@dataclass(frozen=True)
class Dose:
    """Ablation everywhere with a share of the direction: h - strength r (r . h) at every writer."""

    strength: float
    effect: Effect


@dataclass(frozen=True)
class Window:
    """Ablation in the layers `first` to `last` alone, both included."""

    first: int
    last: int
    effect: Effect

    @property
    def width(self) -> int:
        """Layers in it."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Windows:
    """Windows of neighbouring layers.

    Attributes:
        base: the untouched model on the few harmful prompts that `tried` were measured on.
        smallest: of those that were measured on every prompt, the smallest that halves refusal, and of several the one
            with the least KL; None if none does.
    """

    base: Effect
    tried: tuple[Window, ...]
    smallest: Window | None


def halves(effect: Effect, base: Effect) -> bool:
    """Whether at most half of the base's refusals are left."""
    return effect.refusals.share <= base.refusals.share / 2


def sweep_strengths(
    model: LanguageModel, unit: Tensor, data: Validation, baseline: Tensor, base: Effect, progress: Progress
) -> tuple[Dose, ...]:
    """Strengths of 1/8 to 1, and finer ones in the step in which refusals fall to a half; in order of strength."""
    doses = _doses(model, unit, _COARSE, data, baseline, progress)
    end = next((dose.strength for dose in doses if halves(dose.effect, base)), None)
    if end is not None:
        fine = [end - _COARSE[0] * part / _FINE for part in range(1, _FINE)]
        doses += _doses(model, unit, fine, data, baseline, progress)
    return tuple(sorted(doses, key=lambda dose: dose.strength))


def _doses(
    model: LanguageModel,
    unit: Tensor,
    strengths: Sequence[float],
    data: Validation,
    baseline: Tensor,
    progress: Progress,
) -> list[Dose]:
    steers = [Steer(ablate=unit, strength=strength) for strength in strengths]
    found = effects(model, steers, data, baseline, progress, "strengths")
    return [Dose(strength, effect) for strength, effect in zip(strengths, found, strict=True)]


def smallest_dose(doses: Sequence[Dose], base: Effect) -> Dose | None:
    """The least strength that halves refusal."""
    return next((dose for dose in doses if halves(dose.effect, base)), None)


def search_windows(
    model: LanguageModel,
    unit: Tensor,
    data: Validation,
    baseline: Tensor,
    base: Effect,
    few_base: Effect,
    progress: Progress,
) -> Windows:
    """Looks for the fewest neighbouring layers in which ablation halves refusal.

    Widths 1, 2, 4, ... are laid over the layers, half overlapping, on a few harmful prompts; then smaller ones inside
    the smallest that works, for as long as one of these does. Some of each width are measured on every prompt.

    Args:
        base: the untouched model on every prompt. `few_base`: on the first of them, as many as it counts.
    """
    few = Validation(data.harmful[: few_base.refusals.count], [], data.refusal_tokens)
    limit = few_base.refusals.share / 2
    tried = _windows(model, unit, _laid(len(model.stream.layers)), few, None, progress)
    best, smaller = None, _smallest(tried, limit)
    while smaller and (best is None or smaller[0].width < best.width):
        best = smaller[0]
        tried += _windows(model, unit, _inside(best, tried), few, None, progress)
        smaller = _smallest(tried, limit)
    spans = [range(window.first, window.last + 1) for window in _to_confirm(smaller)]
    sure = _windows(model, unit, spans, data, baseline, progress)
    work = [window for window in sure if halves(window.effect, base)]
    return Windows(few_base, tuple(tried), min(work, key=lambda w: (w.width, w.effect.kl or 0.0), default=None))


def _smallest(tried: Sequence[Window], limit: float) -> list[Window]:
    """Those that leave at most so many refusals: the smallest first, of several those with the fewest."""
    works = [window for window in tried if window.effect.refusals.share <= limit]
    return sorted(works, key=lambda w: (w.width, w.effect.refusals.share, w.effect.score))


def _to_confirm(works: Sequence[Window]) -> list[Window]:
    """Three of each width, the smallest first, and the widest of all."""
    by_width: dict[int, list[Window]] = {}
    for window in works:
        by_width.setdefault(window.width, []).append(window)
    several = [window for windows in by_width.values() for window in windows[:3]]
    return list(dict.fromkeys([*several[:_CONFIRMED], *several[-1:]]))


def _laid(layers: int) -> list[range]:
    spans: list[range] = []
    width = 1
    while width < layers:
        starts = [*range(0, layers - width, max(1, width // 2)), layers - width]
        spans += [range(start, start + width) for start in starts]
        width *= 2
    return [*spans, range(layers)]


def _inside(window: Window, known: Sequence[Window]) -> list[range]:
    """Smaller windows in it, of half its width and more, that are not known."""
    end, laid = window.last + 1, {(w.first, w.last + 1) for w in known}
    widths = range(max(1, window.width // 2), window.width)
    spans = [range(start, start + width) for width in widths for start in range(window.first, end - width + 1)]
    return [span for span in spans if (span.start, span.stop) not in laid]


def _windows(
    model: LanguageModel,
    unit: Tensor,
    spans: Sequence[range],
    data: Validation,
    baseline: Tensor | None,
    progress: Progress,
) -> list[Window]:
    if not spans:
        return []
    steers = [Steer(ablate=unit, layers=span) for span in spans]
    found = effects(model, steers, data, baseline, progress, "windows of layers")
    return [Window(span.start, span.stop - 1, effect) for span, effect in zip(spans, found, strict=True)]
