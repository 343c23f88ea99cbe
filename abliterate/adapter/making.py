"""From a checkpoint and what is removed from it to an adapter's tensors and configuration."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from abliterate.adapter.factors import Factors, factors_of
from abliterate.adapter.files import adapter_bytes, adapter_config, adapter_tensors, bias_name
from abliterate.adapter.places import LeftOut, Placed, Target, place_writers
from abliterate.architecture.blueprint import Blueprint
from abliterate.architecture.writer import Plan, Writer
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.read import read_tensor
from abliterate.edit.cut import Cut, Removal, part_of
from abliterate.edit.edits import build_edits, projectors_of
from abliterate.errors import AdapterError, some
from abliterate.progress import Advance, Progress
from abliterate.stages import Once


@dataclass(frozen=True)
class Held:
    """One tensor of the checkpoint whose edit the adapter holds.

    Attributes:
        module: of the running model. `kind`: see `Target`.
        before, after: share along the covectors without and with the adapter; None for a bias, stored as a whole.
        strength: of the edit.
    """

    tensor: str
    module: str
    kind: str
    strength: float
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        config, weights: the files' bytes.
        held: what it holds. `left_out`: what it does not. `targets`: where it is.
    """

    config: bytes
    weights: bytes
    rank: int
    held: tuple[Held, ...]
    left_out: tuple[LeftOut, ...]
    targets: tuple[Target, ...]

    @property
    def lacking(self) -> tuple[LeftOut, ...]:
        """What is left out though the running model needs it."""
        return tuple(each for each in self.left_out if not each.faithful)

    @property
    def plain(self) -> bool:
        """Whether it is nothing but LoRA factors of matrices that are modules of their own, which any loader takes."""
        return all(each.kind in ("linear", "embedding") for each in self.held)


def place(plan: Plan, blueprint: Blueprint, cut: Cut | None, keep_norms: bool, inexact: bool = False) -> Placed:
    """Where the edit of every writer goes.

    Args:
        cut: what is removed; None where that is not known yet, for all there may be.
        keep_norms: columns are to keep their length.
        inexact: also where the adapter lacks a part.

    Raises:
        AdapterError: no adapter gives this edit; the message names what it would lack.
    """
    if keep_norms:
        raise AdapterError(
            "an edit that keeps the length of columns scales every one of them, so it is of full rank and no adapter "
            "holds it; write a checkpoint with --patch FILE, or use a recipe with edit.norms: free"
        )
    wanted = [writer.tensor for writer in plan.edited if cut is None or _removal(cut, plan, writer).strength != 0]
    placed = place_writers(plan, blueprint, wanted)
    if not any(target.kind != "bias" for target in placed.targets):
        raise AdapterError("nothing of this edit is what an adapter could hold; write a checkpoint with --patch FILE")
    if placed.lacking and not inexact:
        lacking = some(f"{each.tensor} ({each.why})" for each in placed.lacking)
        raise AdapterError(
            f"no adapter holds this edit whole: it would lack {lacking}; write a checkpoint with "
            "--patch FILE, or add --inexact for an adapter without that"
        )
    return placed


def make_adapter(
    checkpoint: Checkpoint, plan: Plan, blueprint: Blueprint, cut: Cut, base: tuple[str, str | None],
    progress: Progress, inexact: bool = False,
) -> Adapter:  # fmt: skip
    """Reads every writer once.

    Args:
        base: Hub id or name, and revision.

    Raises:
        AdapterError: see `place`.
    """
    placed = place(plan, blueprint, cut, cut.keep_norms, inexact)
    work = _Work(checkpoint, plan, cut)
    total = sum(checkpoint.tensors[w.tensor].nbytes for target in placed.targets for w in target.writers)
    with progress.bar("factors", total, "B") as advance:
        found = {t.module: work.factors(t, advance) for t in placed.targets if t.kind != "bias"}
    rank = max(each.b.shape[1] for factors in found.values() for each in factors)
    tensors: dict[str, Tensor] = {}
    for target in placed.targets:
        if target.kind == "bias":
            tensors[bias_name(target.module, found)] = work.bias(target.writers[0])
        else:
            tensors |= adapter_tensors(target, found[target.module], rank)
    names = [name for name, _ in blueprint.model.named_modules()]
    config = adapter_config(*base, placed.targets, rank, names)
    held = [each for target in placed.targets for each in work.held(target, found.get(target.module, ()))]
    return Adapter(config, adapter_bytes(tensors), rank, tuple(held), placed.left_out, placed.targets)


class _Work:
    """The edits of one checkpoint; what they can share is made once."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, cut: Cut) -> None:
        self._checkpoint, self._plan, self._cut = checkpoint, plan, cut
        self._projectors = projectors_of(checkpoint, plan, cut)
        self._edits = Once(lambda: build_edits(checkpoint, plan, cut))

    def factors(self, target: Target, advance: Advance) -> list[Factors]:
        """Of each of the target's writers."""
        found = []
        for writer in target.writers:
            removal = _removal(self._cut, self._plan, writer)
            projector = self._projectors[removal.basis].of(writer)
            made = factors_of(self._checkpoint, writer.tensor, writer.axis, projector, removal.strength, advance)
            found.append(made)
        return found

    def bias(self, writer: Writer) -> Tensor:
        """A bias as the conversion stores it."""
        info = self._checkpoint.tensors[writer.tensor]
        stored = read_tensor(self._checkpoint.shard_of(writer.tensor), info)
        return self._edits()[writer.tensor].apply(slice(0, info.numel), stored)

    def held(self, target: Target, factors: Sequence[Factors]) -> list[Held]:
        """What is said of the target's tensors."""
        shares: list[tuple[float | None, float | None]] = [(each.before, each.after) for each in factors]
        shares = shares or [(None, None)]
        return [
            Held(w.tensor, target.module, target.kind, _removal(self._cut, self._plan, w).strength, before, after)
            for w, (before, after) in zip(target.writers, shares, strict=True)
        ]


def _removal(cut: Cut, plan: Plan, writer: Writer) -> Removal:
    return cut.removal(writer, part_of(writer, plan.writers))
