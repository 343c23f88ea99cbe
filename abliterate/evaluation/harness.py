"""Benchmarks of lm-evaluation-harness, an extra: its tasks and scores, our forward passes, streamed or not."""

import contextlib
import functools
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.calibration.runner import Bar
from abliterate.errors import AbliterateError, EvaluationError, first_line
from abliterate.evaluation.answers import along
from abliterate.progress import SILENT, Progress

log = logging.getLogger(__name__)

TOGETHER = 1024
"""So many requests a run: streamed weights are read once for all of them."""
CONTEXT, NEW_TOKENS = 2048, 256
RESAMPLES = 1000
HOW_TO_INSTALL = "benchmarks need lm-evaluation-harness: pip install 'abliterate[eval]'"


@dataclass(frozen=True)
class Benchmark:
    """One score of one task.

    Attributes:
        metric: as the harness names it; with its filter where that is not `none`.
        stderr: its standard error; None where the harness gives none.
        samples: how many documents it is taken over; None for groups.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None


def check_tasks(tasks: Sequence[str], task_path: Path | None) -> None:
    """Whether the harness is there and knows the tasks, before long work.

    Raises:
        EvaluationError: it is not installed, or does not know a task.
    """
    known = set(_manager(task_path).all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise EvaluationError(f"no task is called {', '.join(unknown)}; --task-path FOLDER adds your own (YAML)")


def run_tasks(
    model: LanguageModel, tasks: Sequence[str], task_path: Path | None = None, progress: Progress = SILENT
) -> tuple[Benchmark, ...]:
    """Runs tasks on a model as they are written: no chat template, the number of examples that the task names.

    Args:
        task_path: a folder with task files of your own; the harness runs Python code that they refer to.

    Raises:
        EvaluationError: the harness is not installed, or a task fails (its data cannot be had, say).
    """
    manager = _manager(task_path)
    from lm_eval import simple_evaluate

    try:
        with contextlib.redirect_stdout(sys.stderr):
            results = simple_evaluate(
                _as_harness_model(Scorer(model, progress)),
                tasks=list(tasks),
                task_manager=manager,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
            )
    except AbliterateError:
        raise
    except Exception as error:  # data sets and task code raise errors of every kind
        raise EvaluationError(f"benchmark {', '.join(tasks)} failed: {first_line(error)}") from error
    return tuple(benchmarks_in(results))


def _manager(task_path: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(HOW_TO_INSTALL) from error
    if task_path is not None and not task_path.is_dir():
        raise EvaluationError(f"{task_path} is not a folder with task files")
    return TaskManager(include_path=str(task_path) if task_path is not None else None)


def benchmarks_in(results: Mapping[str, Any]) -> Iterator[Benchmark]:
    """The scores in what the harness returns."""
    for task, scores in results["results"].items():
        count = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in scores.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{chosen}")
            known = isinstance(error, int | float) and math.isfinite(error)
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            yield Benchmark(task, name, float(value), float(error) if known else None, count)


@dataclass(frozen=True)
class Scorer:
    """What the harness asks of a model, in token ids."""

    model: LanguageModel
    progress: Progress = SILENT

    @property
    def context(self) -> int:
        """How many tokens the model can read."""
        positions = getattr(getattr(self.model.model, "config", None), "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else CONTEXT

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids; the tokenizer's own special tokens unless the text begins with one, or `special` says."""
        tokenizer = self.model.tokenizer
        if special is None:
            special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    @property
    def end(self) -> int:
        """The token that ends a text."""
        return int(self.model.end_tokens[0]) if self.model.end_tokens else 0

    @property
    def prefix(self) -> int:
        """The token that stands before a text without context."""
        begin = self.model.tokenizer.bos_token_id
        return int(begin) if begin is not None else self.end

    def likelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is the greedy one.

        Contexts that are too long lose their start; a continuation without tokens is certain.
        """
        cut = [(list(first)[-max(1, self.context - len(then)) :], list(then)[: self.context]) for first, then in pairs]
        asked = [number for number, (_, then) in enumerate(cut) if then]
        found = [(0.0, True)] * len(pairs)
        for start in range(0, len(asked), TOGETHER):
            numbers = asked[start : start + TOGETHER]
            contexts, continuations = zip(*(cut[number] for number in numbers), strict=True)
            work = functools.partial(_likelihood, continuations)
            sizes = list(map(len, continuations))
            scores = along(self.model, contexts, continuations, sizes, work, Bar(self.progress, "benchmark"))
            for number, score in zip(numbers, scores, strict=True):
                found[number] = score
        return found

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of whole texts in nats, in windows as long as the model reads, each token predicted once."""
        pairs, owners = [], []
        for number, text in enumerate(texts):
            tokens = self.encode(text)
            for start in range(0, len(tokens), self.context - 1):
                before = tokens[start - 1] if start else self.prefix
                pairs.append(([before], tokens[start : start + self.context - 1]))
                owners.append(number)
        totals = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, self.likelihoods(pairs), strict=True):
            totals[owner] += value
        return totals

    def complete(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Greedy completions, each cut before the first of its own stop texts."""
        found: dict[int, str] = {}
        by_length: dict[int, list[int]] = {}
        for number, (_, settings) in enumerate(asked):
            by_length.setdefault(int(settings.get("max_gen_toks", NEW_TOKENS)), []).append(number)
        if any(settings.get("do_sample") or settings.get("temperature") for _, settings in asked):
            log.warning("a task asks for sampled answers; greedy ones are given")
        for length, numbers in by_length.items():
            prompts = [self.encode(asked[i][0])[-max(1, self.context - length) :] for i in numbers]
            completions = self.model.generate(prompts, length, self.progress, "benchmark")
            for i, tokens in zip(numbers, completions, strict=True):
                found[i] = _cut(self.model.tokenizer.decode(tokens, skip_special_tokens=True), asked[i][1].get("until"))
        return [found[i] for i in range(len(asked))]


def _likelihood(continuations: Sequence[Tokens], number: int, logits: Tensor) -> tuple[float, bool]:
    target = logits.new_tensor(list(continuations[number])).long()
    chosen = logits.log_softmax(-1).gather(-1, target[:, None])
    return float(chosen.double().sum()), bool((logits.argmax(-1) == target).all())


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    stops = [until] if isinstance(until, str) else list(until or ())
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def _as_harness_model(scorer: Scorer) -> Any:
    """The scorer in the shape of the harness, whose classes are there only once it is imported."""
    from lm_eval.api.model import TemplateLM

    class _Model(TemplateLM):  # type: ignore[misc]
        tokenizer = scorer.model.tokenizer
        eot_token_id = scorer.end
        prefix_token_id = scorer.prefix
        max_length = scorer.context

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return scorer.encode(string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return scorer.likelihoods([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return scorer.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return scorer.complete([request.args for request in requests])

    return _Model()
