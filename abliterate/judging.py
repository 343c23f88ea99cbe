"""`--judge SPEC`: which judge is meant, and its verdicts on the answers of an evaluated model."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import urlsplit

from abliterate.calibration.load import pick_device
from abliterate.checkpoint.glimpse import glimpse
from abliterate.checkpoint.locate import find, resolve
from abliterate.errors import EvaluationError
from abliterate.evaluation.endpoint import EndpointJudge
from abliterate.evaluation.judge import ChatJudge, Exchange, Judge, load_classifier
from abliterate.evaluation.metrics import by_kind
from abliterate.evaluation.sets import Evaluation, EvaluationSet, Samples
from abliterate.progress import Progress
from abliterate.proving import tongue_of
from abliterate.subject import RunOptions, load_model, opened
from abliterate.traffic import Passes, tell_traffic

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
FORMS = "classifier:PATH[#LABEL], chat:PATH or http(s)://HOST/v1#MODEL"


@dataclass(frozen=True)
class JudgeSpec:
    """What `--judge` says.

    Attributes:
        place: a folder, a Hub id, or an address.
        detail: the label of refusals, or the name of the model at the address.
    """

    kind: Literal["classifier", "chat", "endpoint"]
    place: str
    detail: str | None = None


def parse_judge(text: str) -> JudgeSpec:
    """Reads a specification.

    Raises:
        EvaluationError: it has none of the forms.
    """
    kind, _, rest = text.partition(":")
    if kind in ("http", "https"):
        return _endpoint(text)
    if kind == "chat" and rest:
        return JudgeSpec("chat", rest)
    place, _, label = rest.partition("#")
    if kind == "classifier" and place:
        return JudgeSpec("classifier", place, label or None)
    raise EvaluationError(f"no judge is meant by {text[:100]!r}; write {FORMS}")


def _endpoint(text: str) -> JudgeSpec:
    address, _, model = text.partition("#")
    try:
        parts = urlsplit(address)
        named, secret = parts.hostname, "@" in parts.netloc
        _ = parts.port
    except ValueError:
        named, secret = None, False
    if secret:
        raise EvaluationError(f"the judge's address holds a user name or password; use the variable {KEY_VARIABLE}")
    if not named or not model:
        raise EvaluationError(
            f"the judge's address has no {'model' if named else 'host'}; write http(s)://HOST/v1#MODEL"
        )
    return JudgeSpec("endpoint", address, model)


def summon(spec: JudgeSpec, options: RunOptions, stack: ExitStack) -> Callable[[], Judge]:
    """Finds a judge now, and makes it when it is needed: its weights need not lie beside those of who is judged.

    Args:
        stack: the judge can be asked until this is closed.

    Raises:
        AbliterateError: it cannot be found or asked.
    """
    if spec.kind == "endpoint":
        judge = EndpointJudge(spec.place, spec.detail or "", os.environ.get(KEY_VARIABLE) or None)
        judge.check()
        return lambda: judge
    if spec.kind == "chat" and options.cache_limit is not None:
        with glimpse(spec.place) as source:
            name = source.name
    else:
        if options.cache_limit is not None and find(spec.place) is None:
            log.warning("the judge %s is fetched whole: transformers loads classifiers from whole files", spec.place)
        source = resolve(spec.place)
        name = source.name
    if spec.kind == "classifier":
        return lambda: load_classifier(source.folder, spec.detail, name, pick_device(options.device))
    return lambda: _chat_judge(spec.place, name, options, stack)


def _chat_judge(place: str, name: str, options: RunOptions, stack: ExitStack) -> ChatJudge:
    """Without the template and system prompt that are meant for the model that is judged, and without its code."""
    own = replace(options, template=None, system_prompt=None, trust_remote_code=False)
    subject = stack.enter_context(opened(place, None, own, inexact=True))
    tongue = tongue_of(subject, own, "off")
    if tongue.chat is None:
        raise EvaluationError(f"{name} is no judge: it has no chat template")
    tell_traffic(subject, own, Passes(2, 0))
    return ChatJudge(load_model(subject, own, tokenizer=tongue.tokenizer), tongue.chat, name)


def judged(
    evaluation: Evaluation,
    data: EvaluationSet,
    requests: Sequence[str],
    answers: Sequence[str],
    judge: Judge,
    progress: Progress,
) -> Evaluation:
    """The evaluation with the judge's rates.

    Args:
        requests, answers: in the order of `EvaluationSet.prompts`.

    Raises:
        EvaluationError: it cannot be asked, or says neither yes nor no to anything.
    """
    exchanges = [Exchange(request, answer) for request, answer in zip(requests, answers, strict=True)]
    flags = judge.refusals(exchanges, progress)
    silent = flags.count(None)
    if silent == len(flags):
        raise EvaluationError(f"the judge {judge.name} says neither yes nor no to any question; use another")
    if silent:
        log.warning("the judge %s gave no verdict on %d of %d answers: left out", judge.name, silent, len(flags))
    return evaluation.having(Samples(by_kind(data, "judge", flags)), judge.name)
