"""The gradient probe: which tensors of an unknown architecture write to the residual stream, along which axis, and
through what, found on a tiny twin with random weights (how: see `held`, `trace`, `gradients`; the edits: DESIGN 3.3).

A tensor that writes linearly has, unfolded along the stream's axis, a gradient of rank 1 over all tokens and draws, and
its covector is the one left singular vector. All that is found is projected out of the twin, which must then have
nothing left along r at any point: `Probe.residual` says whether it does, whatever the gradients could not see.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from abliterate.architecture.gradients import Gradients, take_gradients
from abliterate.architecture.held import HeldConstant
from abliterate.architecture.prepared import prepared, some_tokens, stream_width, tensors_of
from abliterate.architecture.spans import Span, explain, find_span, joined
from abliterate.architecture.trace import Inputs, find_stream, record
from abliterate.architecture.writer import Path
from abliterate.errors import ArchitectureError

_DRAWS = 10
_MOST_COVECTORS = 8
_ROUNDS = 8
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Found:
    """A tensor that writes to the residual stream, and can be projected so that it adds nothing along r.

    Attributes:
        parameter: run-time name, of a parameter or of a buffer that is stored.
        axis: of length width, along which to project.
        covectors: fp64 [width, k], orthonormal; projecting their span out is exact.
        cosine: length of r's projection on that span.
        boundary: the point of the stream (row of `Probe.skip`) that `through` starts from.
        through: how r there becomes the covectors, with run-time names; None where no known steps explain them.
        seen: False where no token reached it, and it is taken to be like one of the same layer that some did (experts).
    """

    parameter: str
    axis: int
    covectors: Tensor
    cosine: float
    boundary: int
    through: Path | None
    seen: bool = True


@dataclass(frozen=True)
class Probe:
    """What writes to the residual stream of a twin.

    Attributes:
        r: the unit vector [width], fp64, that was projected out.
        found: the writers.
        scales: names of gains and convolutions between writers and the stream, or on a skip path.
        readers: names of all other stored tensors with an axis of length width: they do not write.
        blocked: what writes and cannot be projected, with the number of covectors it would take (at least): tensors,
            layers whose skip path has no one covector, and constants that the code adds and no checkpoint stores.
            Empty where `exact`, as nothing is left then.
        skip: fp64 [layers + 1, width], what r has to be at the input of every layer, and after the last, to become r
            at the end; None where r itself passes.
        boundaries: how it becomes that: for every row of `skip`, the steps from the end to there, with run-time names;
            None where no known steps explain it.
        residuals: max abs(h . r_l) / norm(h), over tokens, left in the twin at every layer's input, after the last
            layer and, where it is another tensor, at the final norm's input.
        layers: names of the decoder layers in call order; one that is called again is named again.
        idle: layers that these inputs did not run (cross-attention to images, say): nothing is known of them.
        fp64: it ran in fp64; else in fp32.
    """

    r: Tensor
    found: tuple[Found, ...]
    scales: tuple[str, ...]
    readers: tuple[str, ...]
    blocked: Mapping[str, int]
    skip: Tensor | None
    boundaries: tuple[Path | None, ...]
    residuals: tuple[float, ...]
    layers: tuple[str, ...]
    idle: tuple[str, ...]
    fp64: bool

    @property
    def residual(self) -> float:
        """The largest of `residuals`."""
        return max(self.residuals)

    @property
    def exact(self) -> bool:
        """Whether projecting what was found leaves nothing."""
        return _is_nothing(self.residual, self.fp64)


def probe(model: nn.Module, inputs: Inputs | None = None, seed: int = 0) -> Probe:
    """Finds the residual writers of a tiny model with random parameters; works on a copy of it.

    Args:
        inputs: keyword arguments of the forward pass; tokens by default. None of their dimensions may be the stream's.
        seed: of r, of the tokens and of the draws.

    Raises:
        ArchitectureError: the width or the layers of the stream are not to be found, or the model does not run.
    """
    width = stream_width(model)
    # The second tokens take other ways through experts: what was taken to be like the experts seen is put to the test.
    runs = [inputs] if inputs is not None else [{"input_ids": some_tokens(model, width, s)} for s in (seed, seed + 1)]
    problem: Exception | None = None
    for wide in (True, False):
        # Some code changes buffers in place, which works only where they need no gradient and no_grad is obeyed.
        for thorough in (True, False):
            try:
                return _Prober(model, runs, width, wide, thorough, seed).probe()
            except ArchitectureError:
                raise
            except Exception as error:  # whatever a model's code raises where it is not run as it expects
                problem = problem or error
    first = f"{type(problem).__name__}: {problem}".partition("\n")[0]
    raise ArchitectureError(f"the model does not run as the gradient probe needs it: {first}") from problem


def project(tensor: Tensor, axis: int, basis: Tensor) -> None:
    """Takes the span of an orthonormal basis [width, k] out of a tensor along an axis of length width, in place."""
    with torch.no_grad():
        rows = tensor.double().movedim(axis, -1)
        tensor.copy_((rows - rows @ basis @ basis.T).movedim(-1, axis))


@dataclass(frozen=True)
class _Round:
    """One look at the gradients: `spans` of the tensors whose gradient is not zero."""

    gradients: Gradients
    spans: Mapping[str, Span]


class _Prober:
    """One probe of one copy of the model."""

    def __init__(
        self, model: nn.Module, runs: Sequence[Inputs], width: int, wide: bool, thorough: bool, seed: int
    ) -> None:
        self._width, self._wide, self._thorough, self._seed = width, wide, thorough, seed
        self._tolerance = 1e-8 if wide else 2e-4
        self._model, self._runs = prepared(model, torch.float64 if wide else torch.float32), runs
        self._stored, self._constants = tensors_of(self._model, width, thorough)
        self._all = self._stored | self._constants
        self._r = _unit(width, seed)
        with self._mode().active():
            self._stream = find_stream(self._model, runs[0], width)
        self._homes = set(self._stream.layers)
        self._found: dict[str, Found] = {}
        self._scales: set[str] = set()

    def probe(self) -> Probe:
        """See the module's `probe`."""
        for tensor in self._all.values():
            tensor.requires_grad_(True)
        for _ in range(_ROUNDS):
            look = self._look()
            new = self._new(look)
            for found in [*new, *self._unrouted(look, new)]:
                project(self._stored[found.parameter], found.axis, found.covectors)
                self._found[found.parameter] = found
            residuals = self._residuals(look.gradients.covectors)
            if not new or _is_nothing(max(residuals), self._wide):
                break
        return self._result(look, residuals)

    def _mode(self) -> HeldConstant:
        names = {id(tensor): name for name, tensor in self._all.items()}
        return HeldConstant(self._width, names, self._wide, self._thorough)

    def _look(self) -> _Round:
        mode = self._mode()
        trace = record(self._model, self._runs[0], self._stream, mode, cut=True)
        gradients = take_gradients(trace, self._stream, self._r, self._all, _DRAWS, self._tolerance, self._seed)
        sizes = {name: max(float(g.abs().max()) for g in by.values()) for name, by in gradients.by_tensor.items()}
        least = self._tolerance * max(sizes.values(), default=0.0)
        active = {name: list(gradients.by_tensor[name].values()) for name, size in sizes.items() if size > least}
        self._scales |= mode.scales & active.keys()
        return _Round(gradients, {name: find_span(g, self._width, self._tolerance) for name, g in active.items()})

    def _residuals(self, covectors: Tensor) -> tuple[float, ...]:
        runs = []
        for inputs in self._runs:
            with torch.no_grad():
                trace = record(self._model, inputs, self._stream, self._mode(), cut=False)
            runs.append([_ratio(h, r) for h, r in zip(trace.points, covectors, strict=False)])
        return tuple(max(at) for at in zip(*runs, strict=False))

    def _new(self, look: _Round) -> list[Found]:
        """What the gradients show for the first time. Of the lowest rank only: the others may fall with these."""
        new = {name: span for name, span in look.spans.items() if self._adds(name, span)}
        lowest = min((span.rank for span in new.values()), default=0)
        return [self._describe(name, span, look.gradients) for name, span in new.items() if span.rank == lowest]

    def _adds(self, name: str, span: Span) -> bool:
        """Whether to project this takes more out of the twin than what was found before."""
        if span.axis is None or span.rank > _MOST_COVECTORS or name not in self._stored or name in self._scales:
            return False
        before = self._found.get(name)
        if before is None:
            return True
        left = span.basis - before.covectors @ (before.covectors.T @ span.basis)
        return float(left.norm()) > 1e-4 and before.covectors.shape[1] < _MOST_COVECTORS

    def _describe(self, name: str, span: Span, gradients: Gradients) -> Found:
        before = self._found.get(name)
        basis = span.basis if before is None else joined(before.covectors, span.basis)
        points = sorted(gradients.by_tensor[name])
        # What a layer adds before its own norms writes to its input's point as much as to its output's.
        places = list(dict.fromkeys(p for point in points for p in (point, max(point - 1, 0))))
        boundary, through = self._explain(name, basis, places, gradients.covectors) or (points[0], None)
        assert span.axis is not None
        return Found(name, span.axis, basis, min(1.0, float((basis.T @ self._r).norm())), boundary, through)

    def _explain(self, name: str, basis: Tensor, places: Sequence[int], covectors: Tensor) -> tuple[int, Path] | None:
        """How r at one of these points becomes the covectors of a tensor or, by its name, of a layer's skip path."""
        homes = (_layer(name, self._homes), None)
        near = {n: t for n, t in self._all.items() if n in self._scales and _layer(n, self._homes) in homes}
        distinct = [
            p for i, p in enumerate(places) if not any(bool((covectors[p] == covectors[q]).all()) for q in places[:i])
        ]
        return explain(basis, [(p, covectors[p]) for p in distinct], near, 1e-6 if self._wide else 1e-3)

    def _boundaries(self, covectors: Tensor) -> tuple[Path | None, ...]:
        """See `Probe`."""
        paths: list[Path | None] = [()]
        names = [*self._stream.layers, ""]
        for point in range(len(covectors) - 2, -1, -1):
            step = self._explain(names[point], covectors[point][:, None], [point + 1], covectors)
            paths.append(None if step is None or paths[-1] is None else (*paths[-1], *step[1]))
        return tuple(reversed(paths))[: len(names)]

    def _result(self, look: _Round, residuals: tuple[float, ...]) -> Probe:
        blocked = {} if _is_nothing(max(residuals), self._wide) else self._blocked(look)
        skip = look.gradients.covectors[: len(self._stream.layers) + 1]
        known = self._found.keys() | self._scales | blocked.keys()
        return Probe(
            r=self._r,
            found=tuple(self._found[name] for name in self._stored if name in self._found),
            scales=tuple(name for name in self._stored if name in self._scales),
            readers=tuple(n for n, t in self._stored.items() if self._width in t.shape and n not in known),
            blocked=blocked,
            skip=None if bool((skip == self._r).all()) else skip,
            boundaries=self._boundaries(look.gradients.covectors),
            residuals=residuals,
            layers=self._stream.layers,
            idle=self._stream.idle,
            fp64=self._wide,
        )

    def _blocked(self, look: _Round) -> dict[str, int]:
        known = self._found.keys() | self._scales
        long = {name: span for name, span in look.spans.items() if self._all[name].numel() >= self._width}
        return {**{name: span.rank for name, span in long.items() if name not in known}, **look.gradients.mixed}

    def _unrouted(self, look: _Round, new: Sequence[Found]) -> Iterator[Found]:
        """Tensors that took no part, and whose names differ from a new writer's of the same layer in numbers only."""
        alike = {self._pattern(found.parameter): found for found in new}
        for name, tensor in self._stored.items():
            like = alike.get(self._pattern(name))
            ran = name in look.spans or name.rpartition(".")[0] in self._stream.called
            zero = name in look.gradients.by_tensor and name not in look.spans
            if like is not None and (zero or not ran) and tensor.shape == self._stored[like.parameter].shape:
                yield replace(like, parameter=name, seen=False)

    def _pattern(self, name: str) -> tuple[str | None, str]:
        return _layer(name, self._homes), _NUMBER.sub("*", name)


def _unit(width: int, seed: int) -> Tensor:
    r = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(r, dim=0)


def _is_nothing(residual: float, wide: bool) -> bool:
    return residual < (1e-10 if wide else 2e-5)


def _ratio(h: Tensor, r: Tensor) -> float:
    """max abs(h . r) / norm(h) over the tokens that are not zero."""
    h = h.double().reshape(-1, r.shape[0])
    norms = h.norm(dim=-1)
    kept = ~(norms < 1e-9)
    worst = float(((h[kept] @ r).abs() / norms[kept]).max()) if kept.any() else 0.0
    return worst if math.isfinite(worst) else math.inf


def _layer(name: str, layers: set[str]) -> str | None:
    """The decoder layer that a tensor belongs to."""
    parts = name.split(".")
    return next((home for end in range(len(parts), 0, -1) if (home := ".".join(parts[:end])) in layers), None)
