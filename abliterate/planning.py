"""`abliterate plan`: what would be edited, kept, and why, from headers alone."""

from abliterate.architecture.writer import Plan
from abliterate.subject import open_subject


def plan(model: str, *, revision: str | None = None) -> Plan:
    """The plan of a checkpoint: every tensor accounted for.

    Raises:
        CheckpointError: missing, gated, damaged or quantized.
        ArchitectureError: its residual writers are not known, or a tensor is not accounted for.
    """
    return open_subject(model, revision).plan
