"""How much a run fetches whose shards come and go, said before it begins; docs/hub.md."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.architecture.blueprint import read_blueprint
from abliterate.architecture.writer import layer_of
from abliterate.calibration.load import pick_device, pick_dtype
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import Header
from abliterate.checkpoint.turns import least, side_by_side, traffic
from abliterate.errors import CheckpointError
from abliterate.sizes import enough, short
from abliterate.subject import RunOptions, Subject, placement_of

log = logging.getLogger(__name__)

CALIBRATION = 27
"""Passes through the model of a calibration with default settings (docs/performance.md)."""
DISCOVERY = 18
"""Of one that finds the refusal tokens alone, the first look at the model included."""
CERTIFICATE = 2
"""Of a certificate's stream, the first look included."""
AUDIT = 6
"""Of an audit with default settings, beside the calibration."""
BESIDE_ANSWERS = 3
"""Of an evaluation, beside one for each token of the answers."""
MOST = 100
"""So many times the checkpoint is more than anyone means to fetch."""


@dataclass(frozen=True)
class Passes:
    """How often a run goes through the weights.

    Attributes:
        model: with all its prompts. `reads`: over the shards alone.
        answers: of `model`, those that are for answers, one a token. `fewer`: the option that makes these fewer.
    """

    model: int
    reads: int
    answers: int = 0
    fewer: str = "a smaller --max-new-tokens"


@dataclass(frozen=True)
class Traffic:
    """What is fetched, in bytes.

    Attributes:
        total: in all. `again`: for every further pass through the model, once shards take turns.
        least: the smallest limit that works.
    """

    total: int
    again: int
    least: int


NOTHING = Traffic(0, 0, 0)


@dataclass(frozen=True)
class Return:
    """A result whose shards are sent away as they are written, and read back to be proved.

    Attributes:
        sizes: of its shards in bytes, in the order of the base's.
        passes: over what is read back.
    """

    sizes: Sequence[int]
    passes: Passes


def tell_traffic(
    subject: Subject, options: RunOptions, passes: Passes, dtype: str | None = None, back: Return | None = None
) -> None:
    """Says what a run will fetch, where its shards come and go.

    Args:
        back: of the result, where it is fetched too.

    Raises:
        CheckpointError: the limit is too small for a pass, or it would be too much by far.
    """
    words = traffic_words(subject, options, passes, dtype, back)
    if words is not None:
        log.warning("%s: %s", subject.name, words)


def traffic_words(
    subject: Subject, options: RunOptions, passes: Passes, dtype: str | None = None, back: Return | None = None
) -> str | None:
    """What `tell_traffic` says; None where nothing is fetched on the way."""
    checkpoint, limit = subject.checkpoint, options.cache_limit
    if limit is None or (checkpoint.keeper is None and back is None):
        return None
    base = _sizes(checkpoint)
    found = foresee(subject, options, passes, base, limit, dtype) if checkpoint.keeper else NOTHING
    again = foresee(subject, options, back.passes, back.sizes, limit, dtype) if back else NOTHING
    pairs = [sum(sizes) for sizes in zip(base, back.sizes, strict=True)] if back else []
    _refuse_too_small(subject.name, limit, max(found.least, again.least, *pairs, 0))
    total, every = found.total + again.total, max(found.again, again.again)
    less = "a larger --cache-limit or more --memory fetches less"
    if passes.answers and every:
        less += f", and so does {passes.fewer}: answers of {passes.answers} tokens take as many passes"
    if total > MOST * checkpoint.nbytes:
        fewer = "; --max-new-tokens makes them fewer" if passes.answers else ""
        raise CheckpointError(
            f"{subject.name} of {short(checkpoint.nbytes)} would be fetched more than {MOST} times over, "
            f"{short(total)} in all, {short(every)} for each of {max(passes.model, back.passes.model if back else 0)} "
            f"passes: {less}{fewer}"
        )
    words = [
        f"{short(checkpoint.nbytes)} in {len(checkpoint.shards)} shards, at most {short(limit)} on the disk at once",
        f"about {short(found.total)} will be fetched" if checkpoint.keeper else "",
        f"about {short(again.total)} of the result will be fetched back to be proved" if back else "",
        f"every pass fetches {short(every)} again: {less}" if every else "",
    ]
    return "; ".join(filter(None, words))


def _sizes(checkpoint: Checkpoint) -> list[int]:
    """Bytes that each shard takes of the limit."""
    keeper = checkpoint.keeper
    return [keeper.size(shard.path.name) if keeper else 0 for shard in checkpoint.shards]


def _refuse_too_small(names: str, limit: int, needed: int) -> None:
    if limit < needed:
        raise CheckpointError(
            f"--cache-limit {limit} is too little for {names}: {needed:,} bytes of shards are needed at once; give "
            f"{enough(needed)} or more"
        )


def foresee(
    subject: Subject, options: RunOptions, passes: Passes, sizes: Sequence[int], limit: int, dtype: str | None = None
) -> Traffic:
    """By going through the shards as the passes will.

    Args:
        sizes: bytes that each shard takes of the limit.
        limit: bytes that may be on the disk at once.
    """
    device = pick_device(options.device)
    computing = pick_dtype(dtype or options.dtype, device, subject.stored_dtype)
    held = placement_of(subject, options, computing, device, fetched=True).held
    beside, layers = _visits(subject, options.trust_remote_code)
    once, every = [{number} for number in range(len(sizes))], layers[held:]
    most = least([*layers, *once, _compared(subject)], sizes)
    limit = max(limit, most)
    again, read = traffic(every, sizes, limit)[1], traffic(once, sizes, limit)[1]
    if not passes.model:
        return Traffic(sum(sizes) + read * (passes.reads - 1), again, most)
    first = traffic([*({number} for number in sorted(beside)), *layers], sizes, limit)[0]
    return Traffic(first + again * (passes.model - 1) + read * passes.reads, again, most)


def _visits(subject: Subject, trust_remote_code: bool) -> tuple[Collection[int], list[Collection[int]]]:
    """Numbers of the shards that hold what is in no layer, and what each layer needs."""
    checkpoint, names = subject.checkpoint, subject.plan.runtime.layers
    numbers = {shard.path: number for number, shard in enumerate(checkpoint.shards)}
    places = read_blueprint(subject.folder, checkpoint.config, trust_remote_code).places(checkpoint.tensors)
    layers: dict[str | None, set[int]] = {None: set(), **{name: set() for name in names}}
    for name, place in places.items():
        if place.parameters:
            layers[layer_of(place.parameters[0], names)].add(numbers[checkpoint.shard_of(name).path])
    return layers[None], [layers[name] for name in names]


def _compared(subject: Subject) -> Collection[int]:
    """The shards of the embedding and of a stored copy of it, which are read side by side."""
    plan, shards = subject.plan, subject.checkpoint.shards
    if not plan.head_copy:
        return ()
    return {number for number, shard in enumerate(shards) if {plan.embedding, plan.head} & shard.tensors.keys()}


def tell_rewrite(subject: Subject) -> None:
    """Says what going once through all shards will fetch, and once more for gains where there are some.

    Raises:
        CheckpointError: see `tell_reading`.
    """
    gains = any(writer.gain or writer.skip for writer in subject.plan.writers)
    steps = [(shard,) for shard in subject.checkpoint.shards]
    tell_reading({subject.name: subject.checkpoint}, steps, 1 + gains)


def tell_reading(
    checkpoints: Mapping[str, Checkpoint], steps: Sequence[Sequence[Header]], passes: int, more: int = 0
) -> None:
    """Says what reading checkpoints will fetch where nothing is run; nothing where no shards come and go.

    Args:
        checkpoints: side by side, by what they are called. `steps`: the shards that each step of a pass needs at once.
        passes: as often as all steps are gone through. `more`: and as often again, perhaps.

    Raises:
        CheckpointError: the limit is too small for a step.
    """
    fetched = {name: each for name, each in checkpoints.items() if each.keeper is not None}
    if not fetched:
        return
    limit, names = next(each.keeper.limit for each in fetched.values() if each.keeper), " and ".join(fetched)
    numbers, sizes = _one_cycle(list(fetched.values()))
    visits = [{numbers[shard.path] for shard in step if shard.path in numbers} for step in steps]
    _refuse_too_small(names, limit, least(visits, sizes))
    first, again = traffic(visits, sizes, limit)
    whole, perhaps = first + again * (passes - 1), again * more
    log.warning(
        "%s: %s in %d shards, at most %s on the disk at once; about %s will be fetched%s",
        names,
        short(sum(sizes)),
        len(sizes),
        short(limit),
        short(whole),
        f", up to {short(whole + perhaps)} where there is a direction to measure" if perhaps else "",
    )


def _one_cycle(checkpoints: Sequence[Checkpoint]) -> tuple[dict[Path, int], list[int]]:
    """Numbers of all shards, in one cycle, and their sizes by number."""
    apart = {shard.path.parent: checkpoint for checkpoint in checkpoints for shard in checkpoint.shards}.values()
    own = [[each.keeper.size(shard.path.name) for shard in each.shards] for each in apart if each.keeper]
    found = side_by_side(own)
    numbers = {
        shard.path: number
        for each, turns in zip(apart, found, strict=True)
        for shard, number in zip(each.shards, turns, strict=True)
    }
    by_number = {
        number: size for sizes, turns in zip(own, found, strict=True) for size, number in zip(sizes, turns, strict=True)
    }
    return numbers, [by_number[number] for number in range(len(by_number))]
