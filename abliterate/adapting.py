"""`abliterate convert --adapter`: the edit as an adapter to the base, in place of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abliterate.adapter.files import CONFIG, WEIGHTS
from abliterate.adapter.making import make_adapter, place
from abliterate.adapter.outline import Outline, outline
from abliterate.adapter_record import adapter_record
from abliterate.architecture.blueprint import Blueprint, read_blueprint
from abliterate.checkpoint.diskio import disk_errors
from abliterate.checkpoint.files import DIRECTION_FILE
from abliterate.checkpoint.locate import find
from abliterate.checkpoint.output import check_target, tidy
from abliterate.conversion import prepare
from abliterate.direction.files import direction_bytes, load_cut
from abliterate.identity import identity_of
from abliterate.job import Job, passes_of
from abliterate.merged import prove_merged
from abliterate.publish.adapter_card import render_adapter_card
from abliterate.publish.manifest import MANIFEST_NAME, manifest_bytes, portable_manifest
from abliterate.recipe import Recipe
from abliterate.resume import keep_only, working
from abliterate.studying import study_base
from abliterate.subject import RunOptions, opened
from abliterate.traffic import BESIDE_ANSWERS, CERTIFICATE, Passes, tell_traffic


@dataclass(frozen=True)
class Adapted:
    """The result.

    Attributes:
        folder: the adapter's.
        manifest: what `abliteration.json` says.
    """

    folder: Path
    manifest: Mapping[str, Any]


def adapt(
    model: str,
    out: Path | str,
    *,
    recipe: Recipe | str = "refusal",
    revision: str | None = None,
    direction: Path | str | None = None,
    options: RunOptions | None = None,
    evaluate: bool = True,
    overwrite: bool = False,
) -> Adapted:
    """Finds what `convert` would remove, and writes it as an adapter in PEFT's format.

    Args:
        model: a folder, or a Hub id (`org/name`, `org/name@revision`).
        out: the folder to make; it exists only when whole.
        recipe, direction: see `convert`.
        evaluate: measure refusals, over-refusals, KL and loss, before and with the adapter merged.

    Raises:
        AdapterError: no adapter gives this edit.
        AbliterateError: see `convert`.
    """
    local = find(model, revision)
    tidy(Path(out))
    check_target(Path(out), overwrite=overwrite, inputs=[local.folder] if local else [])
    options = options or RunOptions()
    with opened(model, revision, options, options.inexact) as subject:
        job = prepare(subject, recipe=recipe, direction=direction, options=options, evaluate=evaluate)
        blueprint, _ = check_adaptable(job)
        tell_traffic(subject, options, passes_of_adapter(job))
        return _adapted(job, blueprint, Path(out), overwrite)


def _adapted(job: Job, blueprint: Blueprint, out: Path, overwrite: bool) -> Adapted:
    subject, inexact, progress = job.subject, job.options.inexact, job.options.progress
    identity = identity_of_adapter(job)
    with working(out, subject.checkpoint, identity, overwrite=overwrite, progress=progress) as (staging, journal):
        folder = staging.folder
        keep_only(folder, {})
        job = replace(job, options=replace(job.options, scratch=folder))
        findings = study_base(job, journal)
        base = (subject.name, subject.source.commit or subject.source.revision)
        adapter = make_adapter(subject.checkpoint, subject.plan, blueprint, findings.cut, base, progress, inexact)
        file = direction_bytes(findings.cut.main[0], cut=findings.cut)
        _write(folder, {CONFIG: adapter.config, WEIGHTS: adapter.weights, DIRECTION_FILE: file})
        merged = prove_merged(job, blueprint, findings, adapter, folder, journal)
        manifest = portable_manifest(adapter_record(job, findings, adapter, file, merged))
        card = _card(job, manifest, out.resolve().name)
        _write(folder, {MANIFEST_NAME: manifest_bytes(manifest), "README.md": card.encode()})
        return Adapted(staging.publish(), manifest)


def passes_of_adapter(job: Job) -> Passes:
    """Over the base, which is also what is run with the adapter merged."""
    before = passes_of(job)
    after = CERTIFICATE + (before.answers + BESIDE_ANSWERS + 1) * job.evaluate
    # factors, shares before and merged, and hashes where nobody vouches for them
    return Passes(before.model + after, before.reads + 1, 2 * before.answers, before.fewer)


def identity_of_adapter(job: Job) -> dict[str, Any]:
    """See `identity_of`."""
    return {**identity_of(job), "adapter": "peft"}


def check_adaptable(job: Job) -> tuple[Blueprint, Outline]:
    """What can be told before anything is calibrated: the running model, without weights, and the adapter's outline.

    Raises:
        AdapterError: no adapter gives an edit of this recipe.
    """
    plan, edit, options, checkpoint = job.subject.plan, job.recipe.edit, job.options, job.subject.checkpoint
    blueprint = read_blueprint(job.subject.folder, checkpoint.config, options.trust_remote_code)
    keep, cut = edit.norms == "kept", None
    if job.direction_file is not None:
        cut = load_cut(job.direction_file, plan.hidden_size, plan.num_layers, edit.strength, keep)
    placed = place(plan, blueprint, cut, cut.keep_norms if cut else keep, options.inexact)
    planned = edit.count if edit.directions == "subspace" else 1
    return blueprint, outline(placed, checkpoint, plan, cut.bases.shape[1] if cut else planned)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    with disk_errors(folder, sum(map(len, files.values()))):
        for name, content in files.items():
            (folder / name).write_bytes(content)


def _card(job: Job, manifest: Mapping[str, Any], name: str) -> str:
    base_card = job.subject.folder / "README.md"
    text = base_card.read_text(encoding="utf-8", errors="replace") if base_card.is_file() else None
    return render_adapter_card(manifest, text, name)
