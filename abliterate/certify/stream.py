"""The certificate's second part: what is left of the direction in the residual stream of the stored weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.calibration.hooks import by_row, on_input, on_output
from abliterate.calibration.model import ResidentModel, Tokens, pad
from abliterate.progress import SILENT, Progress


@dataclass(frozen=True)
class StreamResidual:
    """max over tokens of abs(h . r) / norm(h) at every layer boundary (DESIGN 3.5).

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
    model: ResidentModel, prompts: Sequence[Tokens], direction: Tensor, progress: Progress = SILENT
) -> StreamResidual:
    """Runs the prompts and measures the stream.

    Args:
        model: the stored weights, computing in fp32 for a certificate.
        prompts: token ids.
        direction: unit r [hidden].
    """
    names = [f"layer {i}" for i in range(len(model.stream.layers))] + ["final"]
    ratios: dict[str, float] = {}
    with progress.bar("certificate", len(prompts), "prompt") as advance:
        for rows in model.batches(prompts):
            _batch(model, [prompts[i] for i in rows], direction, ratios)
            advance(len(rows))
    # A boundary that nothing came by is not proved clean.
    layers = tuple(ratios.get(name, math.nan) for name in names)
    return StreamResidual(layers, sum(map(len, prompts)), {name: ratios.get(name, 0.0) for name in model.stream.names})


@torch.inference_mode()
def _batch(model: ResidentModel, prompts: Sequence[Tokens], direction: Tensor, ratios: dict[str, float]) -> None:
    inputs = pad(prompts, model.device)
    real = inputs["attention_mask"].bool()
    with _watched(model, _Watch(real, direction.double().cpu(), ratios)):
        model.logits(prompts)


@dataclass(frozen=True)
class _Watch:
    """Keeps the largest ratio seen under a name; padding is not looked at."""

    real: Tensor
    direction: Tensor
    ratios: dict[str, float]

    def look(self, name: str, hidden: Tensor) -> Tensor:
        rows = by_row(hidden, len(self.real))
        rows = rows.expand(len(self.real), *rows.shape[1:]) if len(rows) != len(self.real) else rows
        kept = rows[self.real].cpu().double()
        ratio = (kept @ self.direction).abs() / kept.norm(dim=-1).clamp_min(1e-30)
        # NaN wins, over what came before and what comes after; `max` of floats would lose it.
        self.ratios[name] = float(torch.stack((ratio.max(), ratio.new_tensor(self.ratios.get(name, 0.0)))).max())
        return hidden


@contextmanager
def _watched(model: ResidentModel, watch: _Watch) -> Iterator[None]:
    stream = model.stream
    with ExitStack() as stack:
        for i, layer in enumerate(stream.layers):
            stack.enter_context(on_input(layer, lambda h, i=i: watch.look(f"layer {i}", h)))  # type: ignore[misc]
        stack.enter_context(on_output(stream.layers[-1:], lambda h: watch.look("final", h)))
        for name, module in zip(stream.names, stream.writers, strict=True):
            stack.enter_context(on_output([module], lambda h, name=name: watch.look(name, h)))  # type: ignore[misc]
        yield
