"""`abliterate audit`: how concentrated refusal is in a model, as a report; no weights are written."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from abliterate.audit.study import AuditSize, Material, study
from abliterate.audit_record import AUDIT_NAME, Setting, audit_bytes, audit_record
from abliterate.calibration.categories import categories_of
from abliterate.calibration.chat import ChatFormat
from abliterate.calibration.load import pick_device
from abliterate.checkpoint.fingerprint import fingerprint
from abliterate.checkpoint.locate import find
from abliterate.checkpoint.output import check_target, tidy
from abliterate.direction.scoring import Validation
from abliterate.find import FoundDirection, find_in
from abliterate.identity import options_identity, prompts_identity
from abliterate.picking import thresholds_of
from abliterate.prompting import Prompts, chat_format, encode, load_calibration
from abliterate.publish.audit_view import PAGE_NAME, audit_page, audit_plots
from abliterate.recipe import Recipe, load_recipe, recipe_word
from abliterate.resume import working
from abliterate.stages import Once, Stages
from abliterate.subject import RunOptions, Subject, load_model, opened, tokenizer_of, versions
from abliterate.traffic import AUDIT, CALIBRATION, Passes, tell_traffic


@dataclass(frozen=True)
class AuditReport:
    """Where the report is, and what it says: the content of `audit.json`."""

    folder: Path
    record: Mapping[str, Any]


@dataclass(frozen=True)
class _Task:
    """Everything one audit starts from."""

    subject: Subject
    recipe: Recipe
    options: RunOptions
    size: AuditSize
    prompts: Prompts
    chat: ChatFormat


def audit_model(
    model: str,
    out: Path | str,
    *,
    recipe: Recipe | str = "refusal",
    revision: str | None = None,
    options: RunOptions | None = None,
    size: AuditSize | None = None,
    overwrite: bool = False,
) -> AuditReport:
    """Audits a checkpoint, and writes `audit.json`, `audit.html` and plots into `out`, which exists only when whole.

    Args:
        model: a folder, or a Hub id (`org/name`, `org/name@revision`).
        recipe: says which prompts, and how the direction is found.
        overwrite: replace the report that is at `out`.

    Raises:
        AbliterateError: see `find_in` and `open_subject`; or the model refuses too little; or `out` cannot be written.
            Where running again can help, what is finished is kept beside `out`, and the same call goes on from there.
    """
    options, out = options or RunOptions(), Path(out)
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    local = find(model, revision)
    tidy(out)
    check_target(out, overwrite=overwrite, inputs=[local.folder] if local else [])
    pick_device(options.device)
    with opened(model, revision, options, inexact=True) as subject:
        prompts = load_calibration(chosen.calibration, options.seed)
        chat = chat_format(tokenizer_of(subject, options), chosen.calibration, options.template, options.system_prompt)
        return _audited(_Task(subject, chosen, options, size or AuditSize(), prompts, chat), out, overwrite)


def _audited(task: _Task, out: Path, overwrite: bool) -> AuditReport:
    options, checkpoint = task.options, task.subject.checkpoint
    identity, progress = _identity(task), options.progress
    tell_traffic(task.subject, options, Passes(CALIBRATION + AUDIT, 0))
    with working(out, checkpoint, identity, overwrite=overwrite, progress=progress) as (staging, journal):
        record = _run(replace(task, options=replace(options, scratch=staging.folder)), journal)
        _write(staging.folder, record)
        return AuditReport(staging.publish(), record)


def _identity(task: _Task) -> dict[str, Any]:
    """All that the report depends on; see `identity`."""
    source = task.subject.source
    return {
        "recipe": task.recipe.as_dict(),
        "prompts": prompts_identity(task.prompts),
        "base": {"name": task.subject.name, "revision": source.revision, "commit": source.commit},
        "files of the base": fingerprint(task.subject.checkpoint),
        "options": options_identity(task.options, task.subject, task.chat),
        "size": asdict(task.size),
        "versions": versions(),
        "command": _command(task),
    }


def _run(task: _Task, stages: Stages) -> dict[str, Any]:
    options, recipe, plan = task.options, task.recipe, task.subject.plan
    tied = plan.shares_edit and (recipe.edit.head == "tied" or plan.untying is None)
    tokenizer = task.chat.tokenizer
    base = Once(lambda: load_model(task.subject, options, tied_head=tied, tokenizer=tokenizer))
    found = find_in(base, task.chat, task.prompts, recipe, options.progress, stages)
    material = _material(task, found)
    audit = study(base(), material, task.size, options.progress, stages)
    setting = Setting(
        task.subject,
        recipe.name,
        _command(task),
        str(base().dtype).removeprefix("torch."),
        material.categories is not None,
    )
    return audit_record(audit, found, setting)


def _material(task: _Task, found: FoundDirection) -> Material:
    choice, prompts, recipe = found.selection.choice, task.prompts, task.recipe
    known = categories_of("harmful", recipe.calibration.harmful)
    names = [known.get(text) for text in prompts.harmful.train.instructions]
    whole = [name for name in names if name is not None]
    return Material(
        directions=found.directions,
        pick=(choice.pick.position, choice.pick.layer),
        unit=found.direction,
        data=Validation(
            encode(task.chat, prompts.harmful.validation),
            encode(task.chat, prompts.harmless.validation),
            found.refusal_tokens.ids,
        ),
        train=encode(task.chat, prompts.harmful.train),
        categories=whole if len(whole) == len(names) else None,
        filtered=recipe.direction.filter,
        thresholds=thresholds_of(recipe.selection),
    )


def _command(task: _Task) -> str:
    """The command that makes the same report again."""
    options, calibration, source = task.options, task.recipe.calibration, task.subject.source
    words = ["abliterate", "audit", task.subject.name, "-o", "OUT", "--recipe", recipe_word(task.recipe)]
    optional: Mapping[str, object] = {
        "--revision": source.commit or source.revision,
        "--harmful": None if calibration.harmful == "builtin" else calibration.harmful,
        "--harmless": None if calibration.harmless == "builtin" else calibration.harmless,
        "--template": options.template,
        "--system-prompt": options.system_prompt,
        "--dtype": None if options.dtype == "auto" else options.dtype,
        "--batch-size": options.batch_size,
        "--seed": options.seed or None,
        "--prompts": task.size.prompts,
        "--directions": task.size.directions,
    }
    for flag, value in optional.items():
        words += [flag, str(value)] if value is not None else []
    switches = {"--exhaustive": task.recipe.selection.exhaustive, "--trust-remote-code": options.trust_remote_code}
    return shlex.join([*words, *(flag for flag, on in switches.items() if on)])


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / AUDIT_NAME).write_bytes(audit_bytes(record))
    for name, content in audit_plots(record).items():
        (folder / name).write_bytes(content)
    (folder / PAGE_NAME).write_text(audit_page(record), encoding="utf-8")
