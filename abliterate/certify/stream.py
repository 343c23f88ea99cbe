"""The certificate's second part: what is left of the direction in the residual stream of the stored weights."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from abliterate.calibration.hooks import by_row, on_input, on_output
from abliterate.calibration.model import LanguageModel, Tokens, pad
from abliterate.calibration.runner import Bar
from abliterate.calibration.tour import run
from abliterate.progress import SILENT, Progress


@dataclass(frozen=True)
class StreamResidual:
    """max over tokens of abs(h . r) / norm(h) at every layer boundary (DESIGN 3.5); of several directions norm(Q h).

    Attributes:
        layers: the input of each decoder layer, and last of all what the final norm reads.
        tokens: how many tokens were looked at.
        writers: the same ratio of each writing module's output, in the order of the plan.
    """

    layers: tuple[float, ...]
    tokens: int
    writers: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest ratio; NaN if any is."""
        values = torch.tensor(self.layers)
        return float(values.max()) if bool(torch.isfinite(values).all()) else float("nan")

    def holds(self, tolerance: float) -> bool:
        """Whether every boundary is within the tolerance; NaN never is."""
        return self.worst <= tolerance

    def first_failure(self, tolerance: float) -> str | None:
        """The first boundary above the tolerance, and the writer that puts most of the direction there."""
        failed = next((i for i, value in enumerate(self.layers) if not value <= tolerance), None)
        if failed is None:
            return None
        where = f"the input of layer {failed}" if failed < len(self.layers) - 1 else "the final norm's input"
        culprits = {name: value for name, value in self.writers.items() if not value <= tolerance}
        before = {name: value for name, value in culprits.items() if _layer_of(name) in (failed - 1, None)}
        if not before and failed == 0:
            return f"{where}, through a module that is not a known embedding"
        if not before:
            return f"{where}, through a module that is not a known writer of layer {failed - 1}"
        return f"{where}, written by {max(before, key=lambda name: before[name])}"


def _layer_of(name: str) -> int | None:
    """The first number in a module's name: its layer."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def measure_stream(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    direction: Tensor,
    progress: Progress = SILENT,
    pulled: Tensor | None = None,
) -> StreamResidual:
    """Runs the prompts and measures the stream.

    Args:
        model: the stored weights, computing in fp32 for a certificate.
        prompts: token ids.
        direction: unit r [hidden], or an orthonormal basis [k, hidden].
        pulled: where the skip path has gains, unit [layers + 1, hidden] or [layers + 1, k, hidden]: the directions as
            they are at the input of each layer, and last at the end.
    """
    count = len(model.stream.layers)
    bearings = _bearings(direction, pulled, count)
    names = boundary_names(count)
    ratios: dict[str, float] = {}
    batches = list(model.batches(prompts))
    calls = [partial(_batch, model, [prompts[i] for i in rows], bearings, ratios, pulled is None) for rows in batches]
    for _ in model.runner.run(calls, Bar(progress, "certificate", list(map(len, batches)))):
        pass
    # A boundary that nothing came by is not proved clean, unless its layer waits for an image: then the stream goes by.
    for i in sorted(model.stream.sometimes, reverse=True):
        ratios.setdefault(names[i], ratios.get(names[i + 1], math.nan))
    layers = tuple(ratios.get(name, math.nan) for name in names)
    return StreamResidual(layers, sum(map(len, prompts)), {name: ratios.get(name, 0.0) for name in model.stream.names})


def measure_picture(
    model: LanguageModel,
    inputs: Mapping[str, Tensor],
    direction: Tensor,
    progress: Progress = SILENT,
    pulled: Tensor | None = None,
) -> StreamResidual:
    """The same with a picture: every token is looked at, those that stand for it too.

    Args:
        inputs: of the model's forward pass, one row.
    """
    count = len(model.stream.layers)
    bearings = _bearings(direction, pulled, count)
    given = {name: value.to(model.device) for name, value in inputs.items()}
    ratios: dict[str, float] = {}
    watch = _Watch(torch.ones_like(given["input_ids"], dtype=torch.bool), ratios)

    def look() -> None:
        with _watched(model, watch, bearings, pulled is None, sometimes=frozenset()):
            run(model.model, {**given, "use_cache": False})

    for _ in model.runner.run([look], Bar(progress, "certificate: picture")):
        pass
    layers = tuple(ratios.get(name, math.nan) for name in boundary_names(count))
    return StreamResidual(layers, watch.real.numel(), {n: ratios.get(n, 0.0) for n in model.stream.names})


def joined(first: StreamResidual, second: StreamResidual) -> StreamResidual:
    """The larger of two measurements at every place; NaN wins."""
    layers = torch.maximum(torch.tensor(first.layers), torch.tensor(second.layers)).tolist()
    pairs = {name: (value, second.writers.get(name, 0.0)) for name, value in first.writers.items()}
    writers = {name: float(torch.tensor(pair).max()) for name, pair in pairs.items()}
    return StreamResidual(tuple(layers), first.tokens + second.tokens, writers)


def _bearings(direction: Tensor, pulled: Tensor | None, layers: int) -> Tensor:
    """An orthonormal basis at every boundary, [layers + 1, k, hidden] fp64."""
    if pulled is None:
        return direction.double().cpu().reshape(1, -1, direction.shape[-1]).expand(layers + 1, -1, -1)
    found = pulled.double().cpu().reshape(layers + 1, -1, pulled.shape[-1])
    return found if found.shape[1] == 1 else torch.linalg.qr(found.mT).Q.mT


def boundary_names(layers: int) -> list[str]:
    """What the places are called that are looked at: the input of each layer, and the end."""
    return [*(f"layer {i}" for i in range(layers)), "final"]


def _batch(
    model: LanguageModel, prompts: Sequence[Tokens], bearings: Tensor, ratios: dict[str, float], writers: bool
) -> None:
    real = pad(prompts, model.device)["attention_mask"].bool()
    with _watched(model, _Watch(real, ratios), bearings, writers, model.stream.sometimes):
        model.logits(prompts)


@dataclass(frozen=True)
class _Watch:
    """Keeps the largest ratio seen under a name; padding is not looked at."""

    real: Tensor
    ratios: dict[str, float]

    def look(self, name: str, hidden: Tensor, basis: Tensor) -> Tensor:
        rows = by_row(hidden, len(self.real))
        rows = rows.expand(len(self.real), *rows.shape[1:]) if len(rows) == 1 else rows
        # Some models put tokens of their own before the prompt, or cut it in blocks: there padding is looked at too.
        kept = rows[self.real.to(rows.device)] if rows.shape[:2] == self.real.shape else rows
        # Hyper-connections carry several streams, side by side or one after another.
        kept = kept.detach().cpu().double().reshape(-1, basis.shape[-1])
        ratio = (kept @ basis.mT).norm(dim=-1) / kept.norm(dim=-1).clamp_min(1e-30)
        # NaN wins, over what came before and what comes after; `max` of floats would lose it.
        self.ratios[name] = float(torch.stack((ratio.max(), ratio.new_tensor(self.ratios.get(name, 0.0)))).max())
        return hidden


@contextmanager
def _watched(
    model: LanguageModel, watch: _Watch, bearings: Tensor, writers: bool, sometimes: Collection[int]
) -> Iterator[None]:
    """Looks at every boundary; at what writers put out too, where the direction is one and the same everywhere."""
    stream = model.stream
    with ExitStack() as stack:
        for i, layer in enumerate(stream.layers):
            stack.enter_context(on_input(layer, lambda h, i=i: watch.look(f"layer {i}", h, bearings[i])))  # type: ignore[misc]
        last = [layer for i, layer in enumerate(stream.layers) if i not in sometimes][-1:]
        stack.enter_context(on_output(last, lambda h: watch.look("final", h, bearings[-1])))
        for name, module in zip(stream.names, stream.writers, strict=True) if writers else ():
            look = lambda h, name=name: watch.look(name, h, bearings[-1])  # noqa: E731
            stack.enter_context(on_output([module], look))
        yield
