"""The pipeline: read a checkpoint, find the refusal direction, project it out of every writer, write, prove, report."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abliterate.calibration.chat import make_chat_format
from abliterate.calibration.load import load_tokenizer, pick_device
from abliterate.certify.certificate import Certificate
from abliterate.certify.stream import StreamResidual
from abliterate.checkpoint.allowance import Allowance
from abliterate.checkpoint.diskio import check_space
from abliterate.checkpoint.elsewhere import weights_at
from abliterate.checkpoint.extend import write_single_index
from abliterate.checkpoint.files import DIRECTION_FILE
from abliterate.checkpoint.header import read_header
from abliterate.checkpoint.locate import Source, find
from abliterate.checkpoint.output import Staging, check_target, tidy
from abliterate.describing import describe
from abliterate.direction.files import load_cut
from abliterate.errors import ArchitectureError, OutputError
from abliterate.evaluation.metrics import evaluate_model
from abliterate.evaluation.sets import Measured
from abliterate.hub.explain import client_log
from abliterate.hub.repository import Destination, Repository
from abliterate.hub.repository import prepare as prepare_repository
from abliterate.hub.sending import Dropping, sending, stored
from abliterate.hub.workbranch import WorkBranch, branch_of
from abliterate.identity import identity_of
from abliterate.job import BaseFindings, Job, Written, command_of, output_bytes, passes_of, return_of, unties
from abliterate.patch.making import check_patch_target, write_patch
from abliterate.prompting import load_calibration
from abliterate.proving import assemble, certify_stream, tongue_of
from abliterate.publish.card import render_card
from abliterate.publish.manifest import MANIFEST_NAME, manifest_bytes, portable_manifest
from abliterate.publish.plots import draw
from abliterate.pushing import Pushed, deliver
from abliterate.recipe import Recipe, load_recipe
from abliterate.resume import bytes_in, working
from abliterate.rewriting import write_edited
from abliterate.space import space_needed
from abliterate.stages import Stages
from abliterate.studying import study_base
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
        weights: `org/name@commit` that has the shards, where the folder does not.
    """

    folder: Path
    holds: bool
    certificate: Certificate
    manifest: Mapping[str, Any]
    pushed: Pushed | None = None
    weights: str | None = None


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
    drop_shards: bool = False,
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
        drop_shards: of a model whose result does not fit on the disk: each shard is removed once it is on a branch of
            that repository, and read back from there to be proved, so that with `cache_limit` neither the base nor the
            result is ever here whole. `out` then holds everything but the shards.
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
    allowance = _allowance(options, push_to) if drop_shards else None
    repository = prepare_repository(push_to) if push_to else None
    with opened(model, revision, options, options.inexact, allowance) as subject:
        job = prepare(subject, recipe=recipe, direction=direction, options=options, evaluate=evaluate)
        tell_traffic(subject, options, passes_of(job), back=return_of(job) if drop_shards else None)
        dropping = _dropping(job, repository, allowance)
        done = converted(job, Path(out), overwrite, repository, dropping)
        if patch is not None and done.holds:
            write_patch(subject, done.folder, Path(patch), progress=options.progress)
        return done


def _allowance(options: RunOptions, push_to: Destination | None) -> Allowance:
    """What shards of the base and of the result share on the disk, where neither stay.

    Raises:
        OutputError: options are missing without which they could not be sent away, or not be known again.
    """
    if push_to is None or options.cache_limit is None or not options.hash_files:
        raise OutputError("shards can only be dropped that are pushed (push_to), under a cache_limit, and hashed")
    return Allowance(options.cache_limit)


def _dropping(job: Job, repository: Repository | None, allowance: Allowance | None) -> Dropping | None:
    if repository is None or allowance is None:
        return None
    shards = [shard.path.name for shard in job.subject.checkpoint.shards]
    with client_log():
        return Dropping(WorkBranch(repository, branch_of(identity_of(job)), shards), allowance)


def converted(
    job: Job,
    out: Path,
    overwrite: bool = False,
    repository: Repository | None = None,
    dropping: Dropping | None = None,
) -> Conversion:
    """`convert` from where its inputs are opened and checked."""
    options, checkpoint, progress = job.options, job.subject.checkpoint, job.options.progress
    sent = dropping.branch if dropping else None
    with (
        working(out, checkpoint, identity_of(job), overwrite=overwrite, progress=progress, sent=sent) as (
            made,
            journal,
        ),
        sending(repository, dropping, made.work, progress, output_bytes(job)) as sender,
    ):
        check_space(made.folder, space_needed(job, made.folder, bytes_in(made.folder), dropping is not None))
        job = replace(job, options=replace(options, scratch=made.folder))
        findings = study_base(job, journal)
        written = write_edited(job, findings, made.folder, journal, sender)
        with stored(sender, made.folder, written.shards) as source:
            certificate, edited = prove(job, findings, source, journal)
            manifest = portable_manifest(describe(job, findings, written, certificate, edited))
            publish_files(job, findings, written, manifest, made.folder, source.folder, out.resolve().name)
            delivered = deliver(sender, certificate.sound, made.folder)
        return _finish(made, certificate, manifest, delivered)


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


def prove(job: Job, findings: BaseFindings, source: Source, stages: Stages) -> tuple[Certificate, Measured | None]:
    """The certificate and the evaluation after, both on the stored files."""
    edited = subject_at(source, job.options.trust_remote_code, job.options.inexact)
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
    job: Job,
    findings: BaseFindings,
    written: Written,
    manifest: Mapping[str, Any],
    folder: Path,
    headers: Path,
    name: str,
) -> None:
    """Manifest, direction, selection plot, model card, and an index that keeps the direction apart from the weights.

    Args:
        headers: the folder where headers of the shards can be read.
        name: of the model, for the card.
    """
    if job.subject.checkpoint.index is None:
        write_single_index(read_header(headers / written.shards[0].name), folder)
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
    return Conversion(folder, certificate.sound, certificate, manifest, delivered, weights_at(folder))


def to_json(conversion: Conversion) -> str:
    """The manifest and where the result is, for scripts."""
    result = {"folder": str(conversion.folder), "holds": conversion.holds, **conversion.manifest}
    if conversion.weights is not None:
        result["weights"] = conversion.weights
    if conversion.pushed is not None:
        result["pushed"] = conversion.pushed.as_dict()
    return json.dumps(result, indent=2)
