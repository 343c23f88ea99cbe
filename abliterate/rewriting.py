"""Writes the edited shards of a conversion, and everything that is carried over beside them."""

from pathlib import Path

from abliterate.checkpoint.carry import carry_over, update_config
from abliterate.checkpoint.extend import TensorCopy
from abliterate.checkpoint.rewrite import ShardRecord, rewrite_checkpoint
from abliterate.edit.edits import build_edits
from abliterate.hub.sending import Sender
from abliterate.job import BaseFindings, Job, Written, unties
from abliterate.journal import Journal
from abliterate.record import EditRecord
from abliterate.resume import keep_only


def write_edited(
    job: Job,
    findings: BaseFindings,
    folder: Path,
    journal: Journal | None = None,
    sender: Sender | None = None,
) -> Written:
    """Shard in, shard out: writers edited, everything else carried over byte for byte; finished shards stay."""
    plan, checkpoint = job.subject.plan, job.subject.checkpoint
    untie = unties(job)
    edits = build_edits(checkpoint, plan, findings.cut, untie)
    copies = [TensorCopy(source, target) for source, target in plan.untying or ()] if untie else []
    options = job.options
    finished = journal.shards if journal is not None else {}
    if journal is not None:
        keep_only(folder, finished)

    def done(record: ShardRecord) -> None:
        if journal is not None:
            journal.finish_shard(record)
        if sender is not None:
            sender.take(folder, record)

    if sender is not None:
        sender.begin(folder, finished.keys())
        for record in finished.values():
            sender.take(folder, record)
    shards = rewrite_checkpoint(
        checkpoint,
        folder,
        edits,
        copies,
        options.progress,
        options.hash_files,
        done=done,
        skip=finished,
        berths=sender.berths if sender is not None else None,
    )
    if journal is not None:
        journal.follow(shards)
    files = carry_over(checkpoint, folder)
    changes = dict.fromkeys(plan.tied_flags, False) if untie else {}
    if changes:
        update_config(folder, changes)
    head = ("untied" if untie else "tied") if plan.tied else "separate"
    forms = {name: edit.form for name, edit in edits.items()}
    return Written(shards, EditRecord(head, tuple(copy.target for copy in copies), changes, forms), tuple(files))
