"""`abliterate compare`: recipes side by side on one model, each with its edit in stored weights."""

import dataclasses
import logging
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from abliterate.calibration.load import pick_device, pick_dtype
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.prompts import PromptSplit
from abliterate.certify.certificate import Certificate
from abliterate.checkpoint.locate import Source, find
from abliterate.checkpoint.output import check_target, tidy
from abliterate.conversion import Conversion, converted, prepare, prove
from abliterate.errors import CalibrationError, RecipeError, SelectionError
from abliterate.evaluation.sets import Evaluation
from abliterate.identity import identity_of
from abliterate.job import BaseFindings, Job, passes_of, unties
from abliterate.publish.comparison import Aim, Certified, Comparison, ComparisonRow, Estimate, mark_front, row_from
from abliterate.publish.comparison_view import BASE, comparison_files
from abliterate.recipe import Recipe, load_recipe, recipe_word
from abliterate.resume import working
from abliterate.rewriting import write_edited
from abliterate.sharing import Shared
from abliterate.stages import Once, Stages
from abliterate.studying import study_base
from abliterate.subject import RunOptions, Subject, load_model, opened
from abliterate.traffic import BESIDE_ANSWERS, CALIBRATION, DISCOVERY, Passes, tell_traffic

log = logging.getLogger(__name__)

T = TypeVar("T")
EDITED = "edited"


@dataclass(frozen=True)
class Report:
    """Where the report is, what it says, and the conversion that was asked for."""

    folder: Path
    comparison: Comparison
    converted: Conversion | None = None


def compare(
    model: str,
    recipes: Sequence[Recipe | str],
    out: Path | str,
    *,
    revision: str | None = None,
    options: RunOptions | None = None,
    overwrite: bool = False,
    to_convert: str | None = None,
) -> Report:
    """Applies each recipe to a model, and measures what it did.

    Activations are computed once for all recipes that take them the same way. The edited weights are written beside the
    report, measured as they are stored, and removed again.

    Args:
        model: a folder, or a Hub id (`org/name`, `org/name@revision`).
        recipes: names, files, or recipes, with the same prompts to calibrate and evaluate on.
        out: the folder of the report: comparison.json, comparison.html, pareto.png. It exists only when whole.
        to_convert: "best", or the name of one of the recipes: is converted into a folder of its name in `out`.

    Raises:
        AbliterateError: see `convert`. Where running again can help, what is finished is kept beside `out`, and the
            same call goes on from there.
    """
    options, out = options or RunOptions(), Path(out)
    chosen = [load_recipe(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]
    _check_recipes(chosen, to_convert)
    local = find(model, revision)
    tidy(out)
    check_target(out, overwrite=overwrite, inputs=[local.folder] if local else [])
    with opened(model, revision, options, options.inexact) as subject:
        return _compared(subject, chosen, out, options, overwrite, to_convert)


def _compared(
    subject: Subject, recipes: Sequence[Recipe], out: Path, options: RunOptions, overwrite: bool, to_convert: str | None
) -> Report:
    jobs = [prepare(subject, recipe=recipe, options=options) for recipe in recipes]
    tell_traffic(subject, options, _passes(jobs, to_convert is not None))
    identity = identity_of(jobs[0]) | {"recipes": {job.recipe.name: job.recipe.as_dict() for job in jobs}}
    identity["command"] = _command(jobs)
    with working(out, subject.checkpoint, identity, overwrite=overwrite, progress=options.progress) as (
        staging,
        stages,
    ):
        scratch = replace(options, scratch=staging.folder)
        comparison = _Comparing([replace(job, options=scratch) for job in jobs], staging.folder, stages).run()
        for name, content in comparison_files(comparison).items():
            (staging.folder / name).write_bytes(content)
        folder = staging.publish()
    winner = _winner(comparison, recipes, to_convert)
    if winner is None:
        return Report(folder, comparison)
    job = next(job for job in jobs if job.recipe is winner)
    return Report(folder, comparison, converted(job, folder / winner.name))


def _passes(jobs: Sequence[Job], converts: bool) -> Passes:
    """Over the base: what recipes share once, and all of a conversion again where one follows."""
    each = [passes_of(job) for job in jobs]
    loads = len({job.subject.plan.shares_edit and not unties(job) for job in jobs})
    searched = (DISCOVERY - 1) * any(job.recipe.direction.refusal_tokens == "auto" for job in jobs)
    own = (CALIBRATION - DISCOVERY + 1) * len(jobs)
    evaluated = (
        len({job.recipe.edit.head for job in jobs}) * (each[0].answers + BESIDE_ANSWERS) if jobs[0].evaluate else 0
    )
    again = max(passes.model for passes in each) * converts
    reads = sum(passes.reads for passes in each) + each[0].reads * converts
    return Passes(loads + searched + own + evaluated + again, reads, each[0].answers)


def _check_recipes(recipes: Sequence[Recipe], to_convert: str | None) -> None:
    """Raises:
    RecipeError: there is nothing to compare, or not on the same prompts.
    """
    names = [recipe.name for recipe in recipes]
    if len(names) < 2 or len(set(names)) < len(names):
        raise RecipeError("compare takes two recipes or more, each once: --recipes refusal,projected")
    if to_convert not in (None, "best", *names):
        raise RecipeError(f"--convert is {to_convert}; allowed: best, {', '.join(names)}")
    first = recipes[0]
    for other in recipes[1:]:
        if (other.calibration, other.evaluation) != (first.calibration, first.evaluation):
            raise RecipeError(
                f"{first.name} and {other.name} have other prompts or another evaluation: compare recipes whose "
                "sections calibration and evaluation are the same"
            )


def _winner(comparison: Comparison, recipes: Sequence[Recipe], to_convert: str | None) -> Recipe | None:
    name = comparison.best.recipe if to_convert == "best" and comparison.best else to_convert
    if name == "best":
        log.warning("no recipe is best, so that nothing is converted")
    return next((recipe for recipe in recipes if recipe.name == name), None)


def _command(jobs: Sequence[Job]) -> str:
    """The command that makes the comparison again: that of a conversion, but for the recipes."""
    words = shlex.split(jobs[0].command)
    words[1], words[words.index("--recipe") : words.index("--recipe") + 2] = (
        "compare",
        ["--recipes", ",".join(recipe_word(job.recipe) for job in jobs)],
    )
    words[words.index("OUT")] = "--out=DIR"
    return shlex.join(words)


@dataclass(frozen=True)
class _Comparing:
    """One comparison on its way."""

    jobs: Sequence[Job]
    folder: Path
    stages: Stages

    def run(self) -> Comparison:
        """Studies the base for all recipes, then makes and measures one edit after the other."""
        shared = Shared(self.stages)
        bases: dict[bool, Once[LanguageModel]] = {}
        studied = [self._studied(job, shared, bases) for job in self.jobs]
        bases.clear()  # the base's weights go before the edited ones come
        rows = [self._row(job, found, shared) for job, found in zip(self.jobs, studied, strict=True)]
        before = next((f.evaluation for f in studied if isinstance(f, BaseFindings) and f.evaluation), None)
        base = None if before is None else row_of(BASE, before.evaluation, 0.0, "not exact", "")
        facts = _facts(self.jobs[0], before.evaluation if before else None)
        return Comparison(self.jobs[0].subject.name, mark_front(rows), base, facts, _command(self.jobs))

    def _studied(self, job: Job, shared: Shared, bases: dict[bool, Once[LanguageModel]]) -> BaseFindings | str:
        """What one recipe finds; or why it finds nothing."""
        tied = job.subject.plan.shares_edit and not unties(job)
        load = lambda: load_model(job.subject, job.options, tied_head=tied, tokenizer=job.tongue.tokenizer)  # noqa: E731
        base = bases.setdefault(tied, Once(load))
        try:
            return study_base(job, shared.of(job.recipe), base)
        except (SelectionError, CalibrationError) as error:
            log.warning("%s: %s", job.recipe.name, error)
            return str(error)

    def _row(self, job: Job, found: BaseFindings | str, shared: Shared) -> ComparisonRow:
        name = job.recipe.name
        if isinstance(found, str):
            return row_of(name, None, shared.seconds[name], "not exact", "", _aim(job.recipe), f"not made: {found}")
        make = lambda: self._measured(job, found, shared)  # noqa: E731
        return row_from(self.stages.stage(f"row of {name}", dict[str, Any], make))

    def _measured(self, job: Job, found: BaseFindings, shared: Shared) -> dict[str, Any]:
        """Writes the edited weights, measures them, and removes them."""
        name, edited = job.recipe.name, self.folder / EDITED
        shutil.rmtree(edited, ignore_errors=True)
        edited.mkdir()
        try:
            start = time.perf_counter()
            write_edited(job, found, edited)
            seconds = shared.seconds[name] + time.perf_counter() - start
            certificate, after = prove(job, found, Source(edited, None, None, None), shared.of(job.recipe))
        finally:
            shutil.rmtree(edited, ignore_errors=True)
        kind, evaluation = certified(certificate), after.evaluation if after else None
        return dataclasses.asdict(row_of(name, evaluation, seconds, kind, certificate.claim, _aim(job.recipe)))


def row_of(
    name: str,
    evaluation: Evaluation | None,
    seconds: float,
    certificate: Certified,
    claim: str,
    aim: Aim = "refusal",
    note: str = "",
) -> ComparisonRow:
    """An evaluation as a row; None leaves its figures out."""

    def estimate(figure: str) -> Estimate | None:
        value = getattr(evaluation, figure, None)
        if evaluation is None or value is None:
            return None
        return Estimate(value, *evaluation.intervals.get(figure, (value, value)))

    return ComparisonRow(
        recipe=name,
        refusals=estimate("refusal_rate_substring"),
        over_refusals=estimate("over_refusal_rate_substring"),
        look_alike=estimate("look_alike_refusal_rate_substring"),
        kl=estimate("kl_first_token"),
        cross_entropy=evaluation.cross_entropy if evaluation else None,
        degenerate=evaluation.degenerate_rate if evaluation else None,
        seconds=seconds,
        certificate=certificate,
        claim=claim,
        aim=aim,
        note=note,
        kl_answered=estimate("kl_first_token_answered"),
        kl_answers=estimate("kl_answers"),
        refusals_score=estimate("refusal_rate_score"),
    )


def certified(certificate: Certificate) -> Certified:
    """What a certificate comes to, in a word."""
    if not certificate.sound:
        return "failed"
    if certificate.holds:
        return "exact"
    return "holds" if certificate.inexact is None else "not exact"


def _aim(recipe: Recipe) -> Aim:
    if recipe.direction.contrast == "false-refusal":
        return "over-refusal"
    return "induce" if recipe.edit.strength < 0 else "refusal"


def _facts(job: Job, evaluation: Evaluation | None) -> tuple[tuple[str, str], ...]:
    """What was measured on."""
    prompts = job.prompts
    sets = (("harmful", prompts.harmful), ("harmless", prompts.harmless), ("look-alike", prompts.look_alike))
    facts = [(f"{name} prompts", _sizes(split)) for name, split in sets]
    device = pick_device(job.options.device)
    dtype = str(pick_dtype(job.options.dtype, device, job.subject.stored_dtype)).removeprefix("torch.")
    facts.append(("precision", f"{dtype} on {device.type}; certificates in float32"))
    if evaluation is not None:
        told = f"greedy, up to {evaluation.max_new_tokens} tokens, judged by phrase and not kept"
        along = f"; KL along the first {evaluation.kl_tokens} of the base's" if evaluation.kl_tokens else ""
        facts.append(("answers", told + along))
    facts.append(("time", "from activations to edited weights, what recipes share counted for each"))
    return tuple(facts)


def _sizes(split: PromptSplit) -> str:
    sizes = [len(part.instructions) for part in (split.train, split.validation, split.test)]
    return f"{split.train.source}: {sizes[0]} to learn from, {sizes[1]} to choose by, {sizes[2]} held out"
