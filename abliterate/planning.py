"""`abliterate plan`: what would be edited, kept, and why, from headers alone."""

from abliterate.architecture.writer import Plan
from abliterate.checkpoint.files import Checkpoint, open_checkpoint
from abliterate.checkpoint.glimpse import glimpse
from abliterate.probing import probe_type
from abliterate.subject import subject_at


def plan(model: str, *, revision: str | None = None, trust_remote_code: bool = False, inexact: bool = False) -> Plan:
    """The plan of a checkpoint: every tensor accounted for. Of a Hub model no weights are fetched.

    Args:
        model: a folder, or a Hub id (`org/name`, `org/name@revision`).

    Raises:
        CheckpointError: missing, gated, damaged or quantized.
        ArchitectureError: its residual writers are not known, or a tensor is not accounted for.
    """
    return plan_and_headers(model, revision, trust_remote_code, inexact)[0]


def plan_and_headers(
    model: str, revision: str | None = None, trust_remote_code: bool = False, inexact: bool = False
) -> tuple[Plan, Checkpoint]:
    """The plan with the headers that it was made from; see `plan`."""
    with glimpse(model, revision) as source:
        subject = subject_at(source, trust_remote_code, inexact)
        return subject.plan, subject.checkpoint


def probed_text(model: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """What the gradient probe finds on a tiny twin, as an entry for the table; also for types that have one.

    Raises:
        ArchitectureError: no tiny twin can be built, or no edit of it is exact.
    """
    with glimpse(model, revision) as source:
        return probe_type(open_checkpoint(source.folder), trust_remote_code).text()
