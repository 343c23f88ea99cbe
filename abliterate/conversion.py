"""The pipeline: read a checkpoint, find the refusal direction, project it out of every writer, write, prove, report."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abliterate.calibration.chat import make_chat_format
from abliterate.calibration.load import load_tokenizer, pick_device
from abliterate.calibration.model import LanguageModel
from abliterate.certify.certificate import Certificate
from abliterate.certify.stream import StreamResidual
from abliterate.checkpoint.carry import carry_over, update_config
from abliterate.checkpoint.diskio import check_space
from abliterate.checkpoint.extend import TensorCopy, write_single_index
from abliterate.checkpoint.files import DIRECTION_FILE
from abliterate.checkpoint.header import read_header
from abliterate.checkpoint.keeper import unfilled
from abliterate.checkpoint.locate import Source, find
from abliterate.checkpoint.output import Staging, check_target, tidy
from abliterate.checkpoint.rewrite import ShardRecord, rewrite_checkpoint
from abliterate.describing import describe
from abliterate.direction.files import direction_bytes, load_cut
from abliterate.edit.cut import Cut
from abliterate.edit.edits import build_edits
from abliterate.errors import ArchitectureError
from abliterate.evaluation.metrics import evaluate_model
from abliterate.evaluation.sets import EvaluationSet, Measured
from abliterate.find import FoundDirection, find_in
from abliterate.hub.courier import Courier, courier
from abliterate.hub.repository import Destination, Repository
from abliterate.hub.repository import prepare as prepare_repository
from abliterate.identity import identity_of
from abliterate.job import BaseFindings, Job, Written, command_of, output_bytes, passes_of, unties
from abliterate.journal import Journal
from abliterate.measuring import discovered_tokens, evaluation_set
from abliterate.patch.making import check_patch_target, write_patch
from abliterate.prompting import load_calibration
from abliterate.proving import assemble, certify_stream, run_stream, stream_text, tongue_of
from abliterate.publish.card import render_card
from abliterate.publish.manifest import MANIFEST_NAME, manifest_bytes, portable_manifest
from abliterate.publish.plots import draw
from abliterate.pushing import Pushed, deliver
from abliterate.recipe import Recipe, load_recipe
from abliterate.record import (
    EditRecord,
    calibration_record,
)
from abliterate.resume import bytes_in, keep_only, working
from abliterate.stages import Once, Stages
from abliterate.subject import RunOptions, Subject, load_model, opened, subject_at
from abliterate.traffic import tell_traffic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """The result.

    Attributes:
        folder: the checkpoint; `NAME.failed` beside the wanted place when the certificate failed.
        holds: whether the certificate holds (where part is left on purpose: whether writers lost what they should).
        manifest: what `abliteration.json` says.
        pushed: what it came to on the Hub; None where it was not pushed.
    """

    folder: Path
    holds: bool
    certificate: Certificate
    manifest: Mapping[str, Any]
    pushed: Pushed | None = None


def convert(
    model: str,
    out: Path | str,
    *,
    recipe: Recipe | str = "refusal",
    revision: str | None = None,
    direction: Path | str | None = None,
    options: RunOptions | None = None,
    evaluate: bool = True,
    overwrite: bool = False,
    push_to: Destination | None = None,
    patch: Path | str | None = None,
) -> Conversion:
    """Converts a checkpoint.

    Args:
        model: a folder, or a Hub id (`org/name`, `org/name@revision`).
        out: the folder to make; it exists only when whole.
        recipe: a shipped recipe's name, a YAML file, or a recipe.
        direction: a safetensors file with a tensor `direction` [hidden]; nothing is calibrated then.
        evaluate: measure refusals, over-refusals, KL and loss before and after.
        overwrite: replace what is in `out`.
        push_to: a repository of the Hub, which shards are sent to as they are finished; see
            `abliterate.hub.repository.destination`. One commit names them once the certificate holds, and `out` comes
            to be after it; none is made where it does not.
        patch: also write a patch there (see `make_patch`), unless the certificate fails.

    Returns:
        The conversion; when its certificate fails the folder is `NAME.failed` and `holds` is False.

    Raises:
        AbliterateError: there is no new OUT. Where running again can help (OutputError: the disk is full, say), what is
            finished is kept beside OUT, and the same call goes on from there.
    """
    # before a model is downloaded that could then not be written
    local = find(model, revision)
    tidy(Path(out))
    check_target(Path(out), overwrite=overwrite, inputs=[local.folder] if local else [])
    if patch is not None:
        check_patch_target(Path(patch), Path(out), overwrite)
    options = options or RunOptions()
    repository = prepare_repository(push_to) if push_to else None
    with opened(model, revision, options, options.inexact) as subject:
        job = prepare(subject, recipe=recipe, direction=direction, options=options, evaluate=evaluate)
        tell_traffic(subject, options, passes_of(job))
        done = _converted(job, Path(out), overwrite, repository)
        if patch is not None and done.holds:
            write_patch(subject, done.folder, Path(patch), progress=options.progress)
        return done


def _converted(job: Job, out: Path, overwrite: bool, repository: Repository | None) -> Conversion:
    """See `convert`."""
    options, checkpoint = job.options, job.subject.checkpoint
    progress = options.progress
    with (
        working(out, checkpoint, identity_of(job), overwrite=overwrite, progress=progress) as (staging, journal),
        courier(repository, progress, output_bytes(job)) as sender,
    ):
        shelf = unfilled(checkpoint.keeper, staging.folder)
        check_space(staging.folder, output_bytes(job) - bytes_in(staging.folder) + shelf)
        job = replace(job, options=replace(options, scratch=staging.folder))
        findings = study_base(job, journal)
        written = write_edited(job, findings, staging.folder, journal, sender)
        certificate, edited = prove(job, findings, staging.folder, journal)
        manifest = portable_manifest(describe(job, findings, written, certificate, edited))
        publish_files(job, findings, written, manifest, staging.folder, out.resolve().name)
        delivered = deliver(sender, certificate.sound, staging.folder)
        return _finish(staging, certificate, manifest, delivered)


def prepare(
    subject: Subject,
    *,
    recipe: Recipe | str = "refusal",
    direction: Path | str | None = None,
    options: RunOptions | None = None,
    evaluate: bool = True,
) -> Job:
    """Reads and checks everything that can be checked before any weight is loaded."""
    options = options or RunOptions()
    pick_device(options.device)
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    tongue = tongue_of(subject, options, chosen.calibration.thinking)
    if direction is None and tongue.chat is None:
        # Says what is missing: the tokenizer, or its chat template.
        make_chat_format(load_tokenizer(subject.folder, options.trust_remote_code), None, options.system_prompt)
    if evaluate and tongue.tokenizer is None:
        log.warning("%s has no tokenizer: nothing can be evaluated", subject.name)
    prompts = load_calibration(chosen.calibration, options.seed)
    file = Path(direction) if direction is not None else None
    if file is not None:
        load_cut(file, subject.plan.hidden_size, subject.plan.num_layers)
    command = command_of(subject, chosen, file, options, evaluate)
    return Job(subject, chosen, options, tongue, prompts, evaluate and tongue.tokenizer is not None, file, command)


def study_base(job: Job, stages: Stages, base: Once[LanguageModel] | None = None) -> BaseFindings:
    """Everything that needs the unedited weights in memory: the direction, and the evaluation before.

    Args:
        base: the model where others need it too; None loads it.
    """
    text = stream_text(job.subject, job.tongue, job.options.trust_remote_code)
    given, progress = job.direction_file, job.options.progress
    if given is not None and not job.evaluate:
        cut = _cut_of(job, given)
        return BaseFindings(cut, direction_bytes(cut.main[0], cut=cut), text)
    tied = job.subject.plan.shares_edit and not unties(job)
    base = base or Once(lambda: load_model(job.subject, job.options, tied_head=tied, tokenizer=job.tongue.tokenizer))
    found, calibration = None, None
    if given is not None:
        cut = _cut_of(job, given)
        file = direction_bytes(cut.main[0], cut=cut)
    else:
        found, calibration = _calibrate(job, base, stages)
        cut, file = found.cut, found.file_bytes()
    data = _evaluation_data(job, base, found, stages) if job.evaluate else None
    stream = stages.stage(
        "stream before", StreamResidual, lambda: run_stream(base(), job.subject, job.options, text, cut.main)
    )
    before = None
    if data is not None:
        measure = lambda: evaluate_model(base(), data, None, progress, "before")  # noqa: E731
        before = stages.stage("evaluation before", Measured, measure)
    return BaseFindings(cut, file, text, stream, found, calibration, data, before)


def _cut_of(job: Job, file: Path) -> Cut:
    """What a direction file is for, with what the recipe says where the file leaves it open."""
    plan, edit = job.subject.plan, job.recipe.edit
    return load_cut(file, plan.hidden_size, plan.num_layers, edit.strength, edit.norms == "kept")


def _calibrate(job: Job, base: Once[LanguageModel], stages: Stages) -> tuple[FoundDirection, Mapping[str, Any]]:
    """The direction, and the record of how it was found."""
    assert job.tongue.chat is not None
    found = find_in(base, job.tongue.chat, job.prompts, job.recipe, job.options.progress, stages)
    record = stages.stage("calibration", dict[str, Any], lambda: calibration_record(found, base(), job.options))
    return found, record


def _evaluation_data(
    job: Job, base: Once[LanguageModel], found: FoundDirection | None, stages: Stages
) -> EvaluationSet:
    ids = found.refusal_tokens.ids if found else None
    if found is None:
        ids = stages.stage(
            "refusal tokens",
            tuple[int, ...] | None,
            lambda: discovered_tokens(base(), job.tongue, job.prompts, job.options.progress),
        )
    longest = job.options.max_new_tokens or job.recipe.evaluation.max_new_tokens
    return evaluation_set(job.tongue, job.prompts, ids, longest, job.recipe.evaluation.kl_tokens)


def write_edited(
    job: Job,
    findings: BaseFindings,
    folder: Path,
    journal: Journal | None = None,
    sender: Courier | None = None,
) -> Written:
    """Shard in, shard out: writers edited, everything else carried over byte for byte; finished shards stay."""
    plan, checkpoint = job.subject.plan, job.subject.checkpoint
    untie = unties(job)
    edits = build_edits(checkpoint, plan, findings.cut, untie)
    copies = [TensorCopy(source, target) for source, target in plan.untying or ()] if untie else []
    options = job.options
    if journal is not None:
        keep_only(folder, journal.shards)

    def done(record: ShardRecord) -> None:
        if journal is not None:
            journal.finish_shard(record)
        if sender is not None:
            sender.take(folder, record)

    if sender is not None and journal is not None:
        for record in journal.shards.values():
            sender.take(folder, record)
    shards = rewrite_checkpoint(
        checkpoint,
        folder,
        edits,
        copies,
        options.progress,
        options.hash_files,
        done=done,
        skip=journal.shards if journal else None,
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


def prove(job: Job, findings: BaseFindings, folder: Path, stages: Stages) -> tuple[Certificate, Measured | None]:
    """The certificate and the evaluation after, both on the stored files."""
    edited = subject_at(Source(folder, None, None, None), job.options.trust_remote_code, job.options.inexact)
    if unties(job) and edited.plan.tied:
        flags = " or ".join(job.subject.plan.tied_flags)
        raise ArchitectureError(
            f"transformers still ties the head, whatever {flags} says: use a recipe with head: tied"
        )
    stream = stages.stage(
        "stream after",
        StreamResidual,
        lambda: certify_stream(edited, job.options, findings.text, findings.cut.main),
    )
    certificate = assemble(edited, job.subject.checkpoint, findings.cut, findings.text, stream, findings.stream)
    if findings.data is None or findings.evaluation is None:
        return certificate, None
    return certificate, stages.stage("evaluation after", Measured, lambda: _measure_edited(job, findings, edited))


def _measure_edited(job: Job, findings: BaseFindings, edited: Subject) -> Measured:
    assert findings.data is not None and findings.evaluation is not None
    model = load_model(edited, job.options, tokenizer=job.tongue.tokenizer)
    return evaluate_model(model, findings.data, findings.evaluation, job.options.progress, "after")


def publish_files(
    job: Job, findings: BaseFindings, written: Written, manifest: Mapping[str, Any], folder: Path, name: str
) -> None:
    """Manifest, direction, selection plot, model card, and an index that keeps the direction apart from the weights."""
    if job.subject.checkpoint.index is None:
        write_single_index(read_header(folder / written.shards[0].name), folder)
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    (folder / DIRECTION_FILE).write_bytes(findings.direction_file)
    draw(manifest, folder)
    base_card = job.subject.folder / "README.md"
    text = base_card.read_text(encoding="utf-8", errors="replace") if base_card.is_file() else None
    (folder / "README.md").write_text(render_card(manifest, text, name), encoding="utf-8")


def _finish(
    staging: Staging, certificate: Certificate, manifest: Mapping[str, Any], delivered: Pushed | None
) -> Conversion:
    folder = staging.publish() if certificate.sound else staging.publish_failed()
    return Conversion(folder, certificate.sound, certificate, manifest, delivered)


def to_json(conversion: Conversion) -> str:
    """The manifest and where the result is, for scripts."""
    result = {"folder": str(conversion.folder), "holds": conversion.holds, **conversion.manifest}
    if conversion.pushed is not None:
        result["pushed"] = conversion.pushed.as_dict()
    return json.dumps(result, indent=2)
