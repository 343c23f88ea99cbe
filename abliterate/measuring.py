"""`abliterate evaluate`: what the saved files do, alone or beside a baseline."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from abliterate.calibration.model import LanguageModel
from abliterate.checkpoint.diskio import check_file_target, write_file
from abliterate.direction.refusal_tokens import find_refusal_tokens
from abliterate.errors import AbliterateError, CalibrationError
from abliterate.evaluation.harness import Benchmark, check_tasks, run_tasks
from abliterate.evaluation.judge import Judge
from abliterate.evaluation.metrics import evaluate_model
from abliterate.evaluation.sets import Evaluation, EvaluationSet, Measured, differences
from abliterate.evaluation.statistics import Mean
from abliterate.judging import judged, parse_judge, summon
from abliterate.progress import Progress
from abliterate.prompting import Prompts, encode, encode_plain, load_calibration, neutral_paragraphs
from abliterate.proving import Tongue, tongue_of
from abliterate.publish.manifest import read_manifest
from abliterate.recipe import Recipe, load_recipe
from abliterate.subject import RunOptions, Subject, load_model, opened_together
from abliterate.traffic import BESIDE_ANSWERS, DISCOVERY, Passes, tell_traffic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extras:
    """What is done beside the evaluation, when it is asked for.

    Attributes:
        judge: who also tells refusals, see `parse_judge`.
        tasks: benchmarks of lm-evaluation-harness. `task_path`: a folder with more of them.
        save_completions: file for the answers, which are kept nowhere else.
    """

    judge: str | None = None
    tasks: tuple[str, ...] = ()
    task_path: Path | None = None
    save_completions: Path | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """A model's evaluation, and its baseline's where one was given, with what is different, prompt by prompt."""

    name: str
    evaluation: Evaluation
    baseline_name: str | None = None
    baseline: Evaluation | None = None
    differences: Mapping[str, Mean] = field(default_factory=dict)
    benchmarks: tuple[Benchmark, ...] = ()
    baseline_benchmarks: tuple[Benchmark, ...] = ()


@dataclass(frozen=True)
class _Heard:
    """One model, its answers still at hand."""

    name: str
    measured: Measured
    answers: tuple[str, ...]
    benchmarks: tuple[Benchmark, ...]


def evaluation_set(
    tongue: Tongue, prompts: Prompts, refusal_tokens: Sequence[int] | None, max_new_tokens: int, kl_tokens: int
) -> EvaluationSet:
    """The held-out prompts as token ids; without a chat format only harmless ones, as plain text."""
    text = "\n\n".join(neutral_paragraphs())
    neutral = encode_plain(tongue.tokenizer, [text])[0]
    if tongue.chat is None:
        plain = encode_plain(tongue.tokenizer, prompts.harmless.test.instructions)
        return EvaluationSet([], plain, neutral, None, max_new_tokens, kl_tokens=kl_tokens)
    return EvaluationSet(
        encode(tongue.chat, prompts.harmful.test),
        encode(tongue.chat, prompts.harmless.test),
        neutral,
        refusal_tokens,
        max_new_tokens,
        encode(tongue.chat, prompts.look_alike.test),
        kl_tokens,
    )


def evaluate(
    model: str,
    *,
    baseline: str | None = None,
    revision: str | None = None,
    recipe: Recipe | str = "refusal",
    options: RunOptions | None = None,
    extras: Extras | None = None,
) -> EvaluationReport:
    """Evaluates a checkpoint on held-out prompts, and compares it with `baseline` (KL, top-1 agreement) when given.

    Args:
        model: folder or Hub id. `baseline` likewise.
        extras: a judge, benchmarks, a file for the answers.

    Raises:
        CalibrationError: no tokenizer, or the baseline's vocabulary differs.
        EvaluationError: the judge or a benchmark cannot be had.
        OutputError: the answers cannot be written.
    """
    options, extras = options or RunOptions(), extras or Extras()
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    with ExitStack() as stack:
        judge = _prepared(extras, options, stack)
        wanted = [(model, revision), *([(baseline, None)] if baseline else [])]
        with opened_together(wanted, options, inexact=True) as (subject, *references):
            task = _task(subject, references[0] if references else None, chosen, options, extras)
            heard, data = _hear_all(task)
        requests = requests_of(data, task.prompts)
        if extras.save_completions is not None:
            write_file(extras.save_completions, _lines(heard, data, requests))
        return _report(heard, _judged(heard, data, requests, judge, options))


@dataclass(frozen=True)
class _Task:
    """One evaluation: the models in the order in which they are heard, and what with.

    Attributes:
        subjects: the model, after its baseline where there is one.
        recorded: refusal tokens by the model's manifest; None where they have to be found.
    """

    subjects: Sequence[Subject]
    recipe: Recipe
    options: RunOptions
    extras: Extras
    tongue: Tongue
    prompts: Prompts
    recorded: tuple[int, ...] | None

    @property
    def longest(self) -> int:
        """Tokens of an answer."""
        return self.options.max_new_tokens or self.recipe.evaluation.max_new_tokens


def _task(subject: Subject, reference: Subject | None, recipe: Recipe, options: RunOptions, extras: Extras) -> _Task:
    """Checks what can be checked before any model is loaded, and says what will be fetched."""
    if reference is not None:
        _check_baseline(subject, reference)
    tongue = _speaking(subject, options, recipe)
    prompts = load_calibration(recipe.calibration, options.seed)
    subjects = [subject] if reference is None else [reference, subject]
    task = _Task(subjects, recipe, options, extras, tongue, prompts, _recorded_tokens(subject))
    for number, each in enumerate(subjects):
        searched = DISCOVERY - 1 if number == 0 and task.recorded is None and tongue.chat is not None else 0
        tell_traffic(each, options, Passes(1 + searched + task.longest + BESIDE_ANSWERS, 0, task.longest))
    if extras.tasks and any(each.checkpoint.keeper for each in subjects):
        log.warning(
            "benchmarks fetch more, a pass for every 1024 requests or token of an answer: how much depends on them"
        )
    return task


def _prepared(extras: Extras, options: RunOptions, stack: ExitStack) -> Callable[[], Judge] | None:
    """Looks for everything that could be missing, before any model is loaded."""
    if extras.save_completions is not None:
        check_file_target(extras.save_completions)
    if extras.tasks:
        check_tasks(extras.tasks, extras.task_path)
    return summon(parse_judge(extras.judge), options, stack) if extras.judge else None


def _hear_all(task: _Task) -> tuple[list[_Heard], EvaluationSet]:
    """One model at a time is in memory; of those that are fetched the one that is not read makes room."""
    heard: list[_Heard] = []
    data, options, extras = None, task.options, task.extras
    labels = ("evaluate",) if len(task.subjects) == 1 else ("baseline", "model")
    for each, label in zip(task.subjects, labels, strict=True):
        model = _loaded(each, options, task.tongue)
        data = data or _evaluation_data(task, model)
        base = heard[0].measured if heard else None
        texts: list[str] = []
        measured = evaluate_model(model, data, base, options.progress, label, texts.extend)
        scores = run_tasks(model, extras.tasks, extras.task_path, options.progress) if extras.tasks else ()
        heard.append(_Heard(each.name, measured, tuple(texts), scores))
        del model
    assert data is not None
    return heard, data


def _evaluation_data(task: _Task, model: LanguageModel) -> EvaluationSet:
    """What is asked; where the manifest names no refusal tokens, with those of the first model's own completions."""
    ids = task.recorded or discovered_tokens(model, task.tongue, task.prompts, task.options.progress)
    return evaluation_set(task.tongue, task.prompts, ids, task.longest, task.recipe.evaluation.kl_tokens)


def requests_of(data: EvaluationSet, prompts: Prompts) -> list[str]:
    """The instructions, in the order of `EvaluationSet.prompts`."""
    sets = [prompts.harmful.test, prompts.harmless.test, prompts.look_alike.test] if data.harmful else []
    return [text for each in sets or [prompts.harmless.test] for text in each.instructions]


def _lines(heard: Sequence[_Heard], data: EvaluationSet, requests: Sequence[str]) -> bytes:
    """JSON lines: which model, which kind of prompt, what was asked, what was answered."""
    sizes = {"harmful": len(data.harmful), "harmless": len(data.harmless), "look_alike": len(data.look_alike)}
    kinds = [kind for kind, size in sizes.items() for _ in range(size)]
    rows = [
        {"model": each.name, "kind": kind, "instruction": request, "completion": answer}
        for each in heard
        for kind, request, answer in zip(kinds, requests, each.answers, strict=True)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")


def _judged(
    heard: Sequence[_Heard],
    data: EvaluationSet,
    requests: Sequence[str],
    summoned: Callable[[], Judge] | None,
    options: RunOptions,
) -> list[Evaluation]:
    found = [each.measured.evaluation for each in heard]
    if summoned is None or not data.harmful:
        return found
    judge = summoned()
    return [
        judged(evaluation, data, requests, each.answers, judge, options.progress)
        for evaluation, each in zip(found, heard, strict=True)
    ]


def _report(heard: Sequence[_Heard], evaluations: Sequence[Evaluation]) -> EvaluationReport:
    last, edited = heard[-1], evaluations[-1]
    if len(heard) == 1:
        return EvaluationReport(last.name, edited, benchmarks=last.benchmarks)
    base, before = heard[0], evaluations[0]
    changes = differences(before, edited)
    return EvaluationReport(last.name, edited, base.name, before, changes, last.benchmarks, base.benchmarks)


def _speaking(subject: Subject, options: RunOptions, recipe: Recipe) -> Tongue:
    tongue = tongue_of(subject, options, recipe.calibration.thinking)
    if tongue.tokenizer is None:
        raise CalibrationError(f"{subject.name} has no tokenizer, so there is nothing to evaluate it on")
    if tongue.chat is None:
        log.warning("%s has no chat template: refusals are not measured; give --template for them", subject.name)
    return tongue


def _loaded(subject: Subject, options: RunOptions, tongue: Tongue) -> LanguageModel:
    return load_model(subject, options, tokenizer=tongue.tokenizer)


def _check_baseline(subject: Subject, reference: Subject) -> None:
    """Raises:
    CalibrationError: figures of the two could not be compared.
    """
    shapes = [s.checkpoint.tensors[s.plan.embedding].shape[0] for s in (subject, reference)]
    if shapes[0] != shapes[1]:
        raise CalibrationError(
            f"{reference.name} is no baseline for {subject.name}: vocabularies of {shapes[1]} and {shapes[0]} tokens"
        )
    types = [each.plan.model_type for each in (subject, reference)]
    if types[0] != types[1]:
        log.warning(
            "%s is %s and its baseline %s is %s: is that meant?", subject.name, types[0], reference.name, types[1]
        )


def discovered_tokens(
    model: LanguageModel, tongue: Tongue, prompts: Prompts, progress: Progress
) -> tuple[int, ...] | None:
    """Refusal tokens found from the model's completions; None, with a note, where it does not refuse enough."""
    if tongue.chat is None:
        return None
    train = (encode(tongue.chat, prompts.harmful.train), encode(tongue.chat, prompts.harmless.train))
    try:
        return find_refusal_tokens(model, *train, progress, tongue.chat.template).ids
    except CalibrationError as error:
        log.info("no rates by refusal score: %s", error)
        return None


def _recorded_tokens(subject: Subject) -> tuple[int, ...] | None:
    """What the manifest says, as data from outside: None where it says nothing that can be used."""
    vocabulary = subject.checkpoint.tensors[subject.plan.embedding].shape[0]
    try:
        calibration = read_manifest(subject.folder)["calibration"]
        ids = tuple(int(token["id"]) for token in calibration["refusal_tokens"]["tokens"])
    except (AbliterateError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return ids if ids and all(0 <= token < vocabulary for token in ids) else None
