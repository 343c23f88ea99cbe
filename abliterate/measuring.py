"""`abliterate evaluate`: what the saved files do, alone or beside a baseline."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from abliterate.calibration.model import LanguageModel
from abliterate.direction.refusal_tokens import find_refusal_tokens
from abliterate.errors import AbliterateError, CalibrationError
from abliterate.evaluation.metrics import evaluate_model
from abliterate.evaluation.sets import Evaluation, EvaluationSet
from abliterate.progress import Progress
from abliterate.prompting import Prompts, encode, encode_plain, load_calibration, neutral_paragraphs
from abliterate.proving import Tongue, tongue_of
from abliterate.publish.manifest import read_manifest
from abliterate.recipe import Recipe, load_recipe
from abliterate.subject import RunOptions, Subject, load_model, open_subject

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationReport:
    """A model's evaluation, and its baseline's where one was given."""

    name: str
    evaluation: Evaluation
    baseline_name: str | None = None
    baseline: Evaluation | None = None


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
) -> EvaluationReport:
    """Evaluates a checkpoint on held-out prompts, and compares it with `baseline` (KL, top-1 agreement) when given.

    Args:
        model: folder or Hub id. `baseline` likewise.

    Raises:
        CalibrationError: no tokenizer, or the baseline's vocabulary differs.
    """
    options = options or RunOptions()
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    subject = open_subject(model, revision, options.trust_remote_code, inexact=True)
    reference = open_subject(baseline, None, options.trust_remote_code, inexact=True) if baseline else None
    tongue = _speaking(subject, options, chosen)
    prompts = load_calibration(chosen.calibration, options.seed)
    tokens = _refusal_tokens(subject, reference, options, tongue, prompts)
    longest = options.max_new_tokens or chosen.evaluation.max_new_tokens
    data = evaluation_set(tongue, prompts, tokens, longest, chosen.evaluation.kl_tokens)
    if reference is None:
        alone = evaluate_model(_loaded(subject, options, tongue), data, None, options.progress)
        return EvaluationReport(subject.name, alone.evaluation)
    base = evaluate_model(_loaded(reference, options, tongue), data, None, options.progress, "baseline")
    _same_vocabulary(subject, reference)
    edited = evaluate_model(_loaded(subject, options, tongue), data, base, options.progress, "model")
    return EvaluationReport(subject.name, edited.evaluation, reference.name, base.evaluation)


def _speaking(subject: Subject, options: RunOptions, recipe: Recipe) -> Tongue:
    tongue = tongue_of(subject, options, recipe.calibration.thinking)
    if tongue.tokenizer is None:
        raise CalibrationError(f"{subject.name} has no tokenizer, so there is nothing to evaluate it on")
    if tongue.chat is None:
        log.warning("%s has no chat template: refusals are not measured; give --template for them", subject.name)
    return tongue


def _loaded(subject: Subject, options: RunOptions, tongue: Tongue) -> LanguageModel:
    return load_model(subject, options, tokenizer=tongue.tokenizer)


def _same_vocabulary(subject: Subject, reference: Subject) -> None:
    shapes = [s.checkpoint.tensors[s.plan.embedding].shape[0] for s in (subject, reference)]
    if shapes[0] != shapes[1]:
        raise CalibrationError(
            f"{reference.name} is no baseline for {subject.name}: vocabularies of {shapes[1]} and {shapes[0]} tokens"
        )


def _refusal_tokens(
    subject: Subject, reference: Subject | None, options: RunOptions, tongue: Tongue, prompts: Prompts
) -> tuple[int, ...] | None:
    """From the manifest, else from the completions of the baseline (or the model); None where it does not refuse."""
    recorded = _recorded_tokens(subject)
    if recorded or tongue.chat is None:
        return recorded
    model = _loaded(reference or subject, options, tongue)
    return discovered_tokens(model, tongue, prompts, options.progress)


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
