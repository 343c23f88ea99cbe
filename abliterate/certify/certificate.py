"""The certificate: both measurements, the tolerances they are held to, and the claim they support (DESIGN 3.5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from abliterate.certify.stream import StreamResidual
from abliterate.certify.weights import WriterResidual

TextKind = Literal["chat", "plain", "random"]


@dataclass(frozen=True)
class Certificate:
    """Proof, or its failure, that the stored checkpoint has no component along the direction in its stream.

    Attributes:
        writers: what every stored residual writer has along its covector, and the tolerance for its dtype.
        stream: max abs(h . r) / norm(h) at every layer boundary of the edited model; `stream_before` of the base.
        tolerance: for the stream.
        text: what ran through the model: chat prompts, plain text, or random tokens where there is no tokenizer.
        leaves: what the edit leaves on purpose; None where the direction is to be gone. Never certified as exact.
        inexact: why no direction is exact on this architecture; None where one is. Never certified either.
    """

    writers: tuple[WriterResidual, ...]
    stream: StreamResidual
    stream_before: StreamResidual | None
    tolerance: float
    text: TextKind
    leaves: str | None = None
    inexact: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the edit sets out to remove the direction whole."""
        return self.leaves is None and self.inexact is None

    @property
    def failed_writers(self) -> tuple[WriterResidual, ...]:
        """Writers above their tolerance."""
        return tuple(writer for writer in self.writers if not writer.holds)

    @property
    def holds(self) -> bool:
        """Whether both parts are within tolerance and nothing was left on purpose."""
        return self.exact and not self.failed_writers and self.stream.holds(self.tolerance)

    @property
    def sound(self) -> bool:
        """Whether the weights are what the edit sets out to make of them, exact or not."""
        return self.holds or self.inexact is not None or (self.leaves is not None and not self.failed_writers)

    @property
    def claim(self) -> str:
        """One sentence that says what was proved."""
        stream, bound = self.stream, self.tolerance
        worst = f"max |h·r|/‖h‖ = {stream.worst:.1e} over {stream.tokens} tokens (tolerance {bound:.1e})"
        if self.inexact is not None:
            return f"not exact: {self.inexact}; {worst}"
        if self.leaves is not None:
            return f"not exact: {self.leaves}; {self._kept()}; {worst}"
        if self.holds:
            return f"no component along r at any layer: {worst}, and all {len(self.writers)} residual writers are clean"
        return f"does not hold: {worst}; {self.failure}"

    @property
    def failure(self) -> str:
        """Where it fails first; empty when it holds."""
        if self.failed_writers:
            first = self.failed_writers[0]
            wrong = "are above tolerance" if first.left == 0 else "have not lost what they should"
            return f"{len(self.failed_writers)} writers {wrong}, first {first.tensor} ({first.after:.1e})"
        place = self.stream.first_failure(self.tolerance)
        return f"the direction is back at {place}" if place else ""

    def _kept(self) -> str:
        """What the weights say of an edit that leaves something."""
        if self.failed_writers:
            return self.failure
        told = sum(writer.left is not None for writer in self.writers)
        rest = "" if told == len(self.writers) else f" ({len(self.writers) - told} could not be compared)"
        return f"{told} residual writers have lost just that{rest}"


def worst_writer(writers: Sequence[WriterResidual]) -> WriterResidual | None:
    """The writer nearest to (or furthest beyond) its tolerance."""
    return max(writers, key=lambda writer: abs(writer.after - (writer.left or 0.0)) / writer.tolerance, default=None)
