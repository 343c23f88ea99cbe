"""What a conversion starts from, what it learns on its way, and what it leaves."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.certify.stream import StreamResidual
from abliterate.checkpoint.extend import TensorCopy, extended_header
from abliterate.checkpoint.files import DIRECTION_FILE
from abliterate.checkpoint.rewrite import ShardRecord
from abliterate.edit.cut import Cut
from abliterate.evaluation.sets import EvaluationSet, Measured
from abliterate.find import FoundDirection
from abliterate.prompting import Prompts
from abliterate.proving import StreamText, Tongue
from abliterate.recipe import Recipe, recipe_word
from abliterate.record import EditRecord
from abliterate.subject import RunOptions, Subject
from abliterate.traffic import BESIDE_ANSWERS, CALIBRATION, CERTIFICATE, DISCOVERY, Passes, Return


@dataclass(frozen=True)
class Job:
    """Everything one conversion starts from."""

    subject: Subject
    recipe: Recipe
    options: RunOptions
    tongue: Tongue
    prompts: Prompts
    evaluate: bool
    direction_file: Path | None
    command: str


@dataclass(frozen=True)
class BaseFindings:
    """What was learned from the unedited model before its weights left memory."""

    cut: Cut
    direction_file: bytes
    text: StreamText
    stream: StreamResidual | None = None
    found: FoundDirection | None = None
    calibration: Mapping[str, Any] | None = None
    data: EvaluationSet | None = None
    evaluation: Measured | None = None


@dataclass(frozen=True)
class Written:
    """What the rewrite left in the staging folder."""

    shards: tuple[ShardRecord, ...]
    edit: EditRecord
    files: tuple[str, ...] = field(default=())


def output_bytes(job: Job) -> int:
    """Size of the weights that will be written."""
    plan, checkpoint = job.subject.plan, job.subject.checkpoint
    added = (plan.untying or ()) if unties(job) else ()
    return checkpoint.nbytes + sum(checkpoint.tensors[source].nbytes for source, _ in added)


def unties(job: Job) -> bool:
    """Whether the head is to keep the unedited embedding: not where that would take other shared tensors apart."""
    plan = job.subject.plan
    return plan.shares_edit and plan.untying is not None and job.recipe.edit.head == "untied"


def passes_of(job: Job) -> Passes:
    """Of a conversion, over the base."""
    answers = (job.options.max_new_tokens or job.recipe.evaluation.max_new_tokens) if job.evaluate else 0
    named = job.recipe.direction.refusal_tokens != "auto"
    calibration = CALIBRATION - (DISCOVERY - 1) * named
    found = calibration if job.direction_file is None else DISCOVERY if job.evaluate else 0
    before = found + answers + BESIDE_ANSWERS * job.evaluate
    gains = any(writer.gain or writer.skip for writer in job.subject.plan.writers)
    return Passes(before + (before > 0), 2 + gains, answers, "--no-evaluate")


def return_of(job: Job) -> Return:
    """What a conversion fetches back whose shards do not stay."""
    plan, checkpoint = job.subject.plan, job.subject.checkpoint
    copies = [TensorCopy(*names) for names in plan.untying or ()] if unties(job) else []
    mine = [[copy for copy in copies if copy.source in shard.tensors] for shard in checkpoint.shards]
    sizes = [extended_header(*each).file_size for each in zip(checkpoint.shards, mine, strict=True)]
    answers = passes_of(job).answers
    gains = any(writer.gain or writer.skip for writer in plan.writers)
    return Return(sizes, Passes(CERTIFICATE + answers + BESIDE_ANSWERS * job.evaluate, 1 + gains, answers))


def command_of(subject: Subject, recipe: Recipe, direction: Path | None, options: RunOptions, evaluate: bool) -> str:
    """The command that makes the same bytes again."""
    words: list[str] = ["abliterate", "convert", subject.name, "OUT", "--recipe", recipe_word(recipe)]
    source = subject.source
    optional: Sequence[tuple[str, object]] = (
        ("--revision", source.commit or source.revision),
        ("--direction", DIRECTION_FILE if direction else None),
        ("--harmful", None if recipe.calibration.harmful == "builtin" else recipe.calibration.harmful),
        ("--harmless", None if recipe.calibration.harmless == "builtin" else recipe.calibration.harmless),
        ("--look-alike", None if recipe.calibration.look_alike == "builtin" else recipe.calibration.look_alike),
        ("--template", options.template),
        ("--system-prompt", options.system_prompt),
        ("--dtype", None if options.dtype == "auto" else options.dtype),
        ("--batch-size", options.batch_size),
        ("--seed", options.seed or None),
        ("--max-new-tokens", options.max_new_tokens if evaluate else None),
    )
    for flag, value in optional:
        words += [flag, str(value)] if value is not None else []
    switches = {
        "--exhaustive": recipe.selection.exhaustive and not direction,
        "--inexact": options.inexact and subject.plan.inexact is not None,
        "--trust-remote-code": options.trust_remote_code,
        "--no-evaluate": not evaluate,
        "--no-hash": not options.hash_files,
    }
    words += [flag for flag, on in switches.items() if on]
    return shlex.join(words)
