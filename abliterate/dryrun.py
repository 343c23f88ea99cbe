"""`abliterate convert --dry-run`: everything checked, nothing written, and of a Hub model no weights fetched."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.adapter.outline import Outline
from abliterate.adapting import check_adaptable, identity_of_adapter, passes_of_adapter
from abliterate.architecture.writer import Plan
from abliterate.calibration.load import pick_device, pick_dtype
from abliterate.checkpoint.diskio import check_space
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.glimpse import glimpse
from abliterate.checkpoint.keeper import unfilled
from abliterate.checkpoint.output import check_target
from abliterate.conversion import prepare
from abliterate.hub.explain import client_log
from abliterate.hub.repository import Destination, look
from abliterate.identity import identity_of
from abliterate.job import Job, passes_of, return_of
from abliterate.recipe import Recipe
from abliterate.resume import outlook
from abliterate.sizes import short
from abliterate.space import space_needed
from abliterate.subject import RunOptions, placement_of, subject_at
from abliterate.traffic import traffic_words


@dataclass(frozen=True)
class DryRun:
    """What a conversion would do: the plan, the checkpoint's headers, and one line in words."""

    plan: Plan
    checkpoint: Checkpoint
    summary: str


def dry_run(
    model: str,
    out: Path | str,
    *,
    recipe: Recipe | str = "refusal",
    revision: str | None = None,
    direction: Path | str | None = None,
    options: RunOptions | None = None,
    evaluate: bool = True,
    overwrite: bool = False,
    push_to: Destination | None = None,
    drop_shards: bool = False,
) -> DryRun:
    """Checks what `convert` would check before it loads any weight, OUT included, and touches nothing.

    Raises:
        AbliterateError: `convert` would fail in the same way.
    """
    push = _push_summary(push_to) if push_to else None
    given = {"recipe": recipe, "direction": direction, "evaluate": evaluate}
    with _looked_at(model, Path(out), revision, options or RunOptions(), overwrite, given) as (job, place):
        left = _left(job, Path(out), identity_of(job), overwrite)
        check_space(place, space_needed(job, place, drops=drop_shards))
        back = return_of(job) if drop_shards else None
        traffic = traffic_words(job.subject, job.options, passes_of(job), back=back)
        words = (_summary(job, Path(out), drop_shards), traffic, left, push)
        return DryRun(job.subject.plan, job.subject.checkpoint, "; ".join(filter(None, words)))


@contextmanager
def _looked_at(
    model: str, out: Path, revision: str | None, options: RunOptions, overwrite: bool, given: Mapping[str, Any]
) -> Iterator[tuple[Job, Path]]:
    """Yields the job, without weights, and a folder on the disk that OUT will be on.

    Args:
        given: for `prepare`.

    Raises:
        AbliterateError: the base, or what is given for it, or OUT, will not do.
    """
    with glimpse(model, revision, options.cache_limit) as source:
        subject = subject_at(source, options.trust_remote_code, options.inexact)
        job = prepare(subject, options=options, **given)
        check_target(out, overwrite=overwrite, inputs=[subject.folder])
        yield job, next(parent for parent in out.resolve().parents if parent.exists())


def _left(job: Job, out: Path, identity: Mapping[str, Any], overwrite: bool) -> str | None:
    """What is said of the work of an earlier run."""
    return outlook(out, identity, overwrite=overwrite, files=job.subject.source.model_id is None)


@dataclass(frozen=True)
class AdapterDryRun:
    """What making an adapter would come to: its outline, and one line in words."""

    outline: Outline
    summary: str


def adapter_dry_run(
    model: str,
    out: Path | str,
    *,
    recipe: Recipe | str = "refusal",
    revision: str | None = None,
    direction: Path | str | None = None,
    options: RunOptions | None = None,
    evaluate: bool = True,
    overwrite: bool = False,
) -> AdapterDryRun:
    """`dry_run` of `adapt`.

    Raises:
        AbliterateError: `adapt` would fail in the same way.
    """
    given = {"recipe": recipe, "direction": direction, "evaluate": evaluate}
    with _looked_at(model, Path(out), revision, options or RunOptions(), overwrite, given) as (job, place):
        _, planned = check_adaptable(job)
        left = _left(job, Path(out), identity_of_adapter(job), overwrite)
        check_space(place, planned.bytes + unfilled(job.subject.checkpoint.keeper, place))
        traffic = traffic_words(job.subject, job.options, passes_of_adapter(job))
        words = (_adapter_summary(job, planned, Path(out)), traffic, left)
        return AdapterDryRun(planned, "; ".join(filter(None, words)))


def _adapter_summary(job: Job, planned: Outline, out: Path) -> str:
    return (
        f"a LoRA of rank {planned.rank} for {len(planned.parts)} tensors along {_direction_words(job)}, "
        f"{short(planned.bytes)} in float32, would be written to {out}, and "
        f"{'evaluated and measured' if job.evaluate else 'measured'} as it is merged; {_running(job)}"
    )


def _push_summary(to: Destination) -> str:
    """What would be pushed where; asks the Hub, and makes nothing there."""
    with client_log():
        found = look(to)
    if found is None:
        return f"{to.repo} would be made, {'public' if to.private is False else 'private'}, and the result pushed to it"
    return f"the result would be pushed to {found.url} ({'private' if found.private else 'public'})"


def _summary(job: Job, out: Path, drops: bool) -> str:
    plan, checkpoint = job.subject.plan, job.subject.checkpoint
    shards = f"written to {out}" if not drops else f"sent to the Hub and not kept, the rest written to {out}"
    return (
        f"{len(plan.writers)} residual writers of {len(checkpoint.tensors)} tensors would be edited along "
        f"{_direction_words(job)}, and {checkpoint.nbytes / 1e9:.2f} GB in {len(checkpoint.shards)} shards {shards}; "
        f"{_running(job)}"
    )


def _direction_words(job: Job) -> str:
    return f"the direction in {job.direction_file}" if job.direction_file else "a direction found by calibration"


def _running(job: Job) -> str:
    device = pick_device(job.options.device)
    dtype = pick_dtype(job.options.dtype, device, job.subject.stored_dtype)
    placement = placement_of(job.subject, job.options, dtype, device)
    weights = "streamed layer by layer" if placement.streamed else "kept in memory"
    return f"models would run with their weights {weights} ({placement.reason})"
