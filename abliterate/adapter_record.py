"""An adapter in words and figures: its manifest, in the parts that it shares with that of a checkpoint."""

from dataclasses import asdict
from typing import Any

from abliterate.adapter.files import CONFIG, WEIGHTS
from abliterate.adapter.making import Adapter, Held
from abliterate.certify.weights import WriterResidual
from abliterate.checkpoint.files import DIRECTION_FILE
from abliterate.checkpoint.listing import hashed, record_of
from abliterate.describing import unmeasured
from abliterate.job import BaseFindings, Job
from abliterate.merged import Merged
from abliterate.record import (
    certificate_record,
    evaluation_record,
    removal_record,
    selection_record,
    tool_record,
)

SCHEMA = "abliteration-adapter/1"


def adapter_record(
    job: Job, findings: BaseFindings, adapter: Adapter, direction: bytes, merged: Merged
) -> dict[str, Any]:
    """The manifest, in the parts that it shares with that of a checkpoint."""
    subject, found, cut = job.subject, findings.found, findings.cut
    plan, options = subject.plan, job.options
    shards = {shard.path.name: shard.path for shard in subject.checkpoint.shards}
    records = hashed(shards, "base", options.progress, subject.checkpoint.shards) if options.hash_files else {}
    written = {CONFIG: adapter.config, WEIGHTS: adapter.weights, DIRECTION_FILE: direction}
    thresholds = {k: v for k, v in job.recipe.as_dict()["selection"].items() if k != "exhaustive"}
    before, after = findings.evaluation, merged.evaluation
    residuals = {residual.tensor: residual for residual in merged.certificate.writers}
    embedded = any(each.tensor == plan.embedding for each in adapter.held)
    return {
        "schema": SCHEMA,
        "tool": tool_record(),
        "base": {
            "id": subject.name,
            "source": "hub" if subject.source.model_id else "local",
            "revision": subject.source.revision,
            "commit": subject.source.commit,
            "model_type": plan.model_type,
            "dtype": sorted({info.dtype for info in subject.checkpoint.tensors.values()}),
            "shards": [{"name": name, **(asdict(records[name]) if records else {})} for name in shards],
        },
        "recipe": job.recipe.as_dict(),
        "calibration": findings.calibration,
        "selection": selection_record(found.selection, thresholds) if found else None,
        "search": asdict(found.search) if found and found.search else None,
        "direction": {
            "file": DIRECTION_FILE,
            "sha256": record_of(direction).sha256,
            "source": "calibrated" if found else "file",
            "hidden_size": plan.hidden_size,
        },
        "edit": {
            "family": plan.family,
            "probed": plan.probed,
            "inexact": plan.inexact,
            "head": "shared" if plan.tied and embedded else "separate",
            "strength": cut.uniform_strength,
            "removes": removal_record(cut),
            "rank": adapter.rank,
            "plain": adapter.plain,
            "tensors": [_held(each, residuals.get(each.tensor)) for each in adapter.held],
            "left_out": [asdict(each) for each in adapter.left_out],
        },
        "certificate": certificate_record(merged.certificate),
        "evaluation": evaluation_record(before.evaluation, after.evaluation) if before and after else None,
        "output": {name: asdict(record_of(content)) for name, content in written.items()},
        "warnings": _warnings(job, findings, adapter, merged),
        "reproduce": f"{job.command} --adapter peft",
    }


def _warnings(job: Job, findings: BaseFindings, adapter: Adapter, merged: Merged) -> list[str]:
    """What a user has to know before using the result."""
    warnings = []
    if findings.found and findings.found.selection.choice.relaxed:
        warnings.append(f"selection relaxed: {findings.found.selection.choice.reason}")
    warnings += [f"{each.tensor} is not in the adapter: {each.why}" for each in adapter.lacking]
    if findings.cut.leaves:
        warnings.append(findings.cut.leaves)
    elif not merged.certificate.sound:
        failure = merged.certificate.failure
        warnings.append(f"merged, it is not within the tolerance that conversions are held to: {failure}")
    return [*warnings, *unmeasured(job)]


def _held(held: Held, residual: WriterResidual | None) -> dict[str, Any]:
    """What the factors leave, and what is left once they are merged into what is stored."""
    merged = None if residual is None else {"after": residual.after, "tolerance": residual.tolerance}
    return {**asdict(held), "merged": merged}
