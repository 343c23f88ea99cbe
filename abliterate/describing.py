"""A conversion in words and figures: its manifest, and what a user has to know before using the result."""

import dataclasses
import hashlib
from typing import Any

from abliterate.certify.certificate import Certificate
from abliterate.checkpoint.files import DIRECTION_FILE
from abliterate.evaluation.sets import Measured
from abliterate.job import BaseFindings, Job, Written, unties
from abliterate.record import (
    base_record,
    certificate_record,
    edit_record,
    evaluation_record,
    output_shards,
    selection_record,
    tool_record,
)


def describe(
    job: Job, findings: BaseFindings, written: Written, certificate: Certificate, edited: Measured | None
) -> dict[str, Any]:
    """The manifest."""
    found, before = findings.found, findings.evaluation
    thresholds = {k: v for k, v in job.recipe.as_dict()["selection"].items() if k != "exhaustive"}
    return {
        "schema": "abliteration/1",
        "tool": tool_record(),
        "base": base_record(job.subject, written.shards),
        "recipe": job.recipe.as_dict(),
        "calibration": findings.calibration,
        "selection": selection_record(found.selection, thresholds) if found else None,
        "search": dataclasses.asdict(found.search) if found and found.search else None,
        "direction": {
            "file": DIRECTION_FILE,
            "sha256": hashlib.sha256(findings.direction_file).hexdigest(),
            "source": "calibrated" if found else "file",
            "hidden_size": job.subject.plan.hidden_size,
        },
        "edit": edit_record(job.subject, findings.cut, written.edit, certificate),
        "certificate": certificate_record(certificate),
        "evaluation": evaluation_record(before.evaluation, edited.evaluation) if before and edited else None,
        "output": {
            "hashed": job.options.hash_files,
            "shards": output_shards(written.shards),
            "files": list(written.files),
        },
        "warnings": warnings_of(job, findings, certificate),
        "reproduce": job.command,
    }


def warnings_of(job: Job, findings: BaseFindings, certificate: Certificate) -> list[str]:
    """What a user has to know before using the result."""
    warnings = []
    if findings.found and findings.found.selection.choice.relaxed:
        warnings.append(f"selection relaxed: {findings.found.selection.choice.reason}")
    if not certificate.exact:
        warnings.append(certificate.claim)
    if not certificate.sound:
        warnings.append(f"certificate failed: {certificate.failure}")
    if job.subject.plan.shares_edit and job.recipe.edit.head == "untied" and not unties(job):
        warnings.append("the head stays tied: untying it would take other shared tensors of this model apart")
    if job.subject.plan.probed and job.subject.plan.inexact is None:
        warnings.append("an architecture that is not in the table: its writers were found, and proved, on a tiny twin")
    if findings.text.unseen is not None:
        warnings.append(f"no picture ran through the model, so only its text part is proved: {findings.text.unseen}")
    return [*warnings, *unmeasured(job)]


def unmeasured(job: Job) -> list[str]:
    """What could not be measured for want of a tokenizer or a chat template."""
    warnings = []
    if job.tongue.tokenizer is None:
        warnings.append("no tokenizer: nothing was evaluated, and random tokens ran through the model")
    if job.evaluate and job.tongue.chat is None:
        warnings.append("no chat template: refusals were not measured")
    return warnings
