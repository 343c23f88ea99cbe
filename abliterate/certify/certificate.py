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
        strength: of the edit; anything but 1 is never certified.
        inexact: why no direction is exact on this architecture; None where one is. Never certified either.
    """

    writers: tuple[WriterResidual, ...]
    stream: StreamResidual
    stream_before: StreamResidual | None
    tolerance: float
    text: TextKind
    strength: float = 1.0
    inexact: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the edit sets out to remove the direction whole."""
        return self.strength == 1.0 and self.inexact is None

    @property
    def failed_writers(self) -> tuple[WriterResidual, ...]:
        """Writers above their tolerance."""
        return tuple(writer for writer in self.writers if not writer.holds)

    @property
    def holds(self) -> bool:
        """Whether both parts are within tolerance and nothing was left on purpose."""
        return self.exact and not self.failed_writers and self.stream.holds(self.tolerance)

    @property
    def claim(self) -> str:
        """One sentence that says what was proved."""
        stream, bound = self.stream, self.tolerance
        worst = f"max |h·r|/‖h‖ = {stream.worst:.1e} over {stream.tokens} tokens (tolerance {bound:.1e})"
        if self.inexact is not None:
            return f"not exact: {self.inexact}; {worst}"
        if not self.exact:
            return f"not exact: strength {self.strength:g} leaves part of the direction on purpose; {worst}"
        if self.holds:
            return f"no component along r at any layer: {worst}, and all {len(self.writers)} residual writers are clean"
        return f"does not hold: {worst}; {self.failure}"

    @property
    def failure(self) -> str:
        """Where it fails first; empty when it holds."""
        if self.failed_writers:
            first = self.failed_writers[0]
            return f"{len(self.failed_writers)} writers are above tolerance, first {first.tensor} ({first.after:.1e})"
        place = self.stream.first_failure(self.tolerance)
        return f"the direction is back at {place}" if place else ""


def worst_writer(writers: Sequence[WriterResidual]) -> WriterResidual | None:
    """The writer nearest to (or furthest beyond) its tolerance."""
    return max(writers, key=lambda writer: writer.after / writer.tolerance, default=None)
