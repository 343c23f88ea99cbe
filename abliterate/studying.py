"""What a conversion learns from the unedited weights: the direction, and the figures before the edit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.calibration.model import LanguageModel
from abliterate.certify.stream import StreamResidual
from abliterate.direction.files import direction_bytes, load_cut
from abliterate.edit.cut import Cut
from abliterate.evaluation.metrics import evaluate_model
from abliterate.evaluation.sets import EvaluationSet, Measured
from abliterate.find import FoundDirection, find_in
from abliterate.job import BaseFindings, Job, unties
from abliterate.measuring import discovered_tokens, evaluation_set
from abliterate.proving import run_stream, stream_text
from abliterate.record import calibration_record
from abliterate.stages import Once, Stages
from abliterate.subject import load_model


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
