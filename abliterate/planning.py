"""`abliterate plan`: what would be edited, kept, and why, from headers alone."""

from abliterate.architecture.writer import Plan
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.glimpse import glimpse
from abliterate.subject import subject_at


def plan(model: str, *, revision: str | None = None) -> Plan:
    """The plan of a checkpoint: every tensor accounted for. Of a Hub model no weights are fetched.

    Args:
        model: a folder, or a Hub id (`org/name`, `org/name@revision`).

    Raises:
        CheckpointError: missing, gated, damaged or quantized.
        ArchitectureError: its residual writers are not known, or a tensor is not accounted for.
    """
    return plan_and_headers(model, revision)[0]


def plan_and_headers(model: str, revision: str | None = None) -> tuple[Plan, Checkpoint]:
    """The plan with the headers that it was made from; see `plan`."""
    with glimpse(model, revision) as source:
        subject = subject_at(source)
        return subject.plan, subject.checkpoint
