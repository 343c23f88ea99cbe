"""`abliterate convert --adapter`: the edit as an adapter to the base, in place of a checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from abliterate.adapter.files import CONFIG, WEIGHTS
from abliterate.adapter.making import Adapter, make_adapter, place
from abliterate.architecture.blueprint import Blueprint, read_blueprint
from abliterate.checkpoint.diskio import disk_errors
from abliterate.checkpoint.files import DIRECTION_FILE
from abliterate.checkpoint.listing import hashed, record_of
from abliterate.checkpoint.locate import find
from abliterate.checkpoint.output import check_target, tidy
from abliterate.conversion import prepare
from abliterate.direction.files import direction_bytes, load_cut
from abliterate.identity import identity_of
from abliterate.job import BaseFindings, Job
from abliterate.publish.adapter_card import render_adapter_card
from abliterate.publish.manifest import MANIFEST_NAME, manifest_bytes, portable_manifest
from abliterate.recipe import Recipe
from abliterate.record import removal_record, selection_record, tool_record
from abliterate.resume import keep_only, working
from abliterate.studying import study_base
from abliterate.subject import RunOptions, open_subject

SCHEMA = "abliteration-adapter/1"


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
    overwrite: bool = False,
) -> Adapted:
    """Finds what `convert` would remove, and writes it as an adapter in PEFT's format.

    Args:
        model: a folder, or a Hub id (`org/name`, `org/name@revision`).
        out: the folder to make; it exists only when whole.
        recipe, direction: see `convert`.

    Raises:
        AdapterError: no adapter gives this edit.
        AbliterateError: see `convert`.
    """
    local = find(model, revision)
    tidy(Path(out))
    check_target(Path(out), overwrite=overwrite, inputs=[local.folder] if local else [])
    options = options or RunOptions()
    subject = open_subject(model, revision, options.trust_remote_code, options.inexact)
    job = prepare(subject, recipe=recipe, direction=direction, options=options, evaluate=False)
    blueprint = check_adaptable(job)
    identity = {**identity_of(job), "adapter": "peft"}
    inexact, progress = options.inexact, options.progress
    with working(Path(out), subject.checkpoint, identity, overwrite=overwrite, progress=progress) as (staging, journal):
        keep_only(staging.folder, {})
        findings = study_base(job, journal)
        base = (subject.name, subject.source.commit or subject.source.revision)
        adapter = make_adapter(subject.checkpoint, subject.plan, blueprint, findings.cut, base, progress, inexact)
        file = direction_bytes(findings.cut.main[0], cut=findings.cut)
        manifest = portable_manifest(_describe(job, findings, adapter, file))
        _write(job, adapter, file, manifest, staging.folder, Path(out).resolve().name)
        return Adapted(staging.publish(), manifest)


def check_adaptable(job: Job) -> Blueprint:
    """What can be told before anything is calibrated; returns the running model, without weights.

    Raises:
        AdapterError: no adapter gives an edit of this recipe.
    """
    plan, edit, options = job.subject.plan, job.recipe.edit, job.options
    blueprint = read_blueprint(job.subject.folder, job.subject.checkpoint.config, options.trust_remote_code)
    keep, cut = edit.norms == "kept", None
    if job.direction_file is not None:
        cut = load_cut(job.direction_file, plan.hidden_size, plan.num_layers, edit.strength, keep)
    place(plan, blueprint, cut, cut.keep_norms if cut else keep, options.inexact)
    return blueprint


def _write(job: Job, adapter: Adapter, direction: bytes, manifest: Mapping[str, Any], folder: Path, name: str) -> None:
    base_card = job.subject.folder / "README.md"
    text = base_card.read_text(encoding="utf-8", errors="replace") if base_card.is_file() else None
    card = render_adapter_card(manifest, text, name)
    files = {
        CONFIG: adapter.config,
        WEIGHTS: adapter.weights,
        DIRECTION_FILE: direction,
        MANIFEST_NAME: manifest_bytes(manifest),
        "README.md": card.encode(),
    }
    with disk_errors(folder, sum(map(len, files.values()))):
        for file, content in files.items():
            (folder / file).write_bytes(content)


def _describe(job: Job, findings: BaseFindings, adapter: Adapter, direction: bytes) -> dict[str, Any]:
    """The manifest, in the parts that it shares with that of a checkpoint."""
    subject, found, cut = job.subject, findings.found, findings.cut
    plan, options = subject.plan, job.options
    shards = {shard.path.name: shard.path for shard in subject.checkpoint.shards}
    records = hashed(shards, "base", options.progress) if options.hash_files else {}
    written = {CONFIG: adapter.config, WEIGHTS: adapter.weights, DIRECTION_FILE: direction}
    thresholds = {k: v for k, v in job.recipe.as_dict()["selection"].items() if k != "exhaustive"}
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
            "tensors": [asdict(each) for each in adapter.held],
            "left_out": [asdict(each) for each in adapter.left_out],
        },
        "output": {name: asdict(record_of(content)) for name, content in written.items()},
        "warnings": _warnings(findings, adapter),
        "reproduce": f"{job.command} --adapter peft",
    }


def _warnings(findings: BaseFindings, adapter: Adapter) -> list[str]:
    """What a user has to know before using the result."""
    warnings = []
    if findings.found and findings.found.selection.choice.relaxed:
        warnings.append(f"selection relaxed: {findings.found.selection.choice.reason}")
    warnings += [f"{each.tensor} is not in the adapter: {each.why}" for each in adapter.lacking]
    if findings.cut.leaves:
        warnings.append(findings.cut.leaves)
    return warnings
