"""`abliterate diff`: two checkpoints beside each other, tensor by tensor, and what kind of edit that is."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from abliterate.architecture.rules import fold_numbers
from abliterate.checkpoint.diskio import check_file_target, write_file
from abliterate.checkpoint.files import DIRECTION_FILE, Checkpoint, open_checkpoint
from abliterate.checkpoint.locate import Source
from abliterate.checkpoint.ondemand import located_together
from abliterate.checkpoint.regular import is_file
from abliterate.difference.findings import Findings
from abliterate.difference.kinds import Verdict, decide
from abliterate.difference.matrix import PairMatrix
from abliterate.difference.measure import measure
from abliterate.difference.otherfiles import OtherFiles, compare_files
from abliterate.difference.pairs import Pairing, pair_tensors
from abliterate.difference.places import Places, places_by_plan, places_by_shape
from abliterate.difference.removal import (
    Covectors,
    Removed,
    given_covectors,
    given_outputs,
    recovered_covectors,
    removed,
)
from abliterate.difference.shared import Shared, as_seen, share
from abliterate.difference.tensors import TensorDifference
from abliterate.direction.files import direction_bytes, load_cut
from abliterate.edit.cut import Cut
from abliterate.errors import AbliterateError, CheckpointError, first_line
from abliterate.progress import SILENT, Progress
from abliterate.publish.manifest import MANIFEST_NAME, read_manifest
from abliterate.subject import plan_of
from abliterate.traffic import tell_reading

ENOUGH = 2
"""So many tensors that are alike but for their number are looked at for high ranks; the others are taken to be so."""


@dataclass(frozen=True)
class Likeness:
    """Differences beside directions from a file.

    Attributes:
        file: name. `directions`: how many it says that a writer loses.
        shared: abs(cosine) of the recovered direction with the file's span; None where nothing was recovered.
        least, median: the same of each changed writer's own leading direction with what the file says of that writer.
        removed: every writer along the file's directions.
    """

    file: str
    directions: int
    shared: float | None
    least: float | None
    median: float | None
    removed: tuple[Removed, ...]


@dataclass(frozen=True)
class Difference:
    """What differs between two checkpoints.

    Attributes:
        base, edited: names. `dtypes`, `sizes`: of all tensors, and bytes of all shards, base and edited.
        model_types: of config.json.
        verdict: the kind of edit, with its evidence.
        pairing: which tensors both have. `tensors`: every pair measured.
        hidden_size: width of the stream. `by_plan`: tensors' places come from the architecture; else why not.
        shared: what changed writers have in common on the stream's side; None where nothing changed.
        removed: every writer along the recovered directions; empty where no few directions hold the differences.
        likeness: the differences beside the directions of a file; None without one.
        files: what differs beside the weights.
        claims: what the edited checkpoint's manifest says of itself: recipe and base; None without one.
    """

    base: str
    edited: str
    dtypes: tuple[tuple[str, ...], tuple[str, ...]]
    sizes: tuple[int, int]
    model_types: tuple[str | None, str | None]
    verdict: Verdict
    pairing: Pairing
    tensors: tuple[TensorDifference, ...]
    hidden_size: int | None
    by_plan: bool
    why_not: str | None
    shared: Shared | None
    removed: tuple[Removed, ...]
    likeness: Likeness | None
    files: OtherFiles
    claims: Mapping[str, str | None] | None

    @property
    def same(self) -> bool:
        """Whether all tensors have the same values under the same names."""
        return self.verdict.kind == "identical" and self.pairing.head is None


def diff(
    base: str,
    edited: str,
    *,
    direction: Path | str | None = None,
    save_direction: Path | str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    cache_limit: int | None = None,
    progress: Progress = SILENT,
) -> Difference:
    """Compares two checkpoints, whoever made them; memory is bounded whatever their size.

    Args:
        base, edited: folders or Hub ids (`org/name@revision`).
        direction: file with a direction to hold the differences against; None takes that in `edited`, if there is one.
        save_direction: file to write the recovered direction to. `overwrite`: replace one that is there.
        cache_limit: bytes of shards of Hub models, of both together, that may be on the disk at once; None downloads
            them whole.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or quantized, or no direction was found that could be saved.
        CalibrationError: the direction file cannot be used.
    """
    if save_direction is not None:
        check_file_target(Path(save_direction), overwrite)
    with located_together([(base, None), (edited, None)], cache_limit, progress) as sources:
        return _compared(sources, direction, save_direction, trust_remote_code, progress)


def _compared(
    sources: Sequence[Source],
    direction: Path | str | None,
    save_direction: Path | str | None,
    trust_remote_code: bool,
    progress: Progress,
) -> Difference:
    before, after = (open_checkpoint(source.folder, source.keeper) for source in sources)
    places, why_not = _places(before, trust_remote_code)
    cut = _cut(direction, after, places)
    pairing = pair_tensors(before, after, places.embedding, places.head)
    steps = [(before.shard_of(pair.name), after.shard_of(pair.other)) for pair in pairing.pairs]
    named = {source.called: each for source, each in zip(sources, (before, after), strict=True)}
    tell_reading(named, steps, 1, more=1)
    tensors = _measure(before, after, pairing, places, progress)
    shared = share(_changed_writers(tensors))
    if save_direction is not None:
        write_file(Path(save_direction), _direction_file(shared))
    verdict = decide(Findings(pairing, tensors, shared))
    wanted = _recovered(tensors, places, shared), given_covectors(before, places, cut[1], tensors) if cut else {}
    lost, lost_of_file = removed(before, after, tensors, places, wanted, progress)
    return Difference(
        base=sources[0].name,
        edited=sources[1].name,
        dtypes=(_dtypes(before), _dtypes(after)),
        sizes=(before.nbytes, after.nbytes),
        model_types=(_model_type(before), _model_type(after)),
        verdict=verdict,
        pairing=pairing,
        tensors=tensors,
        hidden_size=places.hidden_size,
        by_plan=places.plan is not None,
        why_not=why_not,
        shared=shared,
        removed=lost,
        likeness=_likeness(before, tensors, places, shared, cut, lost_of_file) if cut else None,
        files=compare_files(before, after),
        claims=_claims(after),
    )


def _direction_file(shared: Shared | None) -> bytes:
    if shared is None or not shared.one:
        raise CheckpointError("the differences have no one direction in common, so there is none to save")
    return direction_bytes(shared.direction, metadata={"recovered": "from a difference", "form": shared.form})


def _places(base: Checkpoint, trust_remote_code: bool) -> tuple[Places, str | None]:
    """By the plan; where there is none, by shape, and why."""
    try:
        return places_by_plan(base, plan_of(base, trust_remote_code, inexact=True)), None
    except AbliterateError as error:
        return places_by_shape(base), str(error)


def _cut(given: Path | str | None, edited: Checkpoint, places: Places) -> tuple[str, Cut] | None:
    """The directions of a file and its name; one that only came with the checkpoint has to fit, or is left aside."""
    path = Path(given) if given is not None else edited.folder / DIRECTION_FILE
    if given is None and not is_file(path):
        return None
    if places.hidden_size is None:
        raise CheckpointError("the width of the residual stream is not known, so no direction can be compared")
    layers = places.plan.num_layers if places.plan else 1
    return path.name, load_cut(path, places.hidden_size, layers)


def _measure(
    base: Checkpoint, edited: Checkpoint, pairing: Pairing, places: Places, progress: Progress
) -> tuple[TensorDifference, ...]:
    found, high = [], Counter[str]()
    with progress.bar("compare", pairing.nbytes, "B") as advance:
        for pair in pairing.pairs:
            place, alike = places.of(pair.name), fold_numbers(pair.name)
            matrix = PairMatrix.of(pair, base, edited, place.axis)
            found.append(measure(matrix, place, patient=high[alike] < ENOUGH))
            high[alike] += found[-1].rank_is_least
            advance(pair.nbytes)
    return tuple(found)


def _changed_writers(tensors: Sequence[TensorDifference]) -> list[TensorDifference]:
    """Those in which more differs than rounding explains."""
    return [tensor for tensor in tensors if tensor.writes and tensor.differs and tensor.rank > 0]


def _recovered(tensors: Sequence[TensorDifference], places: Places, shared: Shared | None) -> Covectors:
    """Of the directions that were found; none where no few of them hold the differences."""
    if shared is None or not (shared.one or shared.few):
        return {}
    basis = shared.direction[None] if shared.one else shared.basis
    return recovered_covectors(basis, shared.form, tensors, places)


def _likeness(
    base: Checkpoint,
    tensors: Sequence[TensorDifference],
    places: Places,
    shared: Shared | None,
    named: tuple[str, Cut],
    lost: tuple[Removed, ...],
) -> Likeness:
    file, cut = named
    outputs = given_outputs(base, places, cut)
    own = sorted(
        float((outputs[t.name] @ as_seen(t, "plain")[:, 0]).norm())
        for t in _changed_writers(tensors)
        if t.out is not None and t.name in outputs and t.out.shape[0] == cut.hidden_size
    )
    return Likeness(
        file=file,
        directions=len(cut.main),
        shared=_along(cut.main, shared),
        least=own[0] if own else None,
        median=own[len(own) // 2] if own else None,
        removed=lost,
    )


def _along(basis: Tensor, shared: Shared | None) -> float | None:
    if shared is None or len(shared.direction) != basis.shape[-1]:
        return None
    basis = basis.double() / basis.double().norm(dim=1, keepdim=True)
    return float((basis @ shared.direction.double()).norm())


def _claims(edited: Checkpoint) -> dict[str, str | None] | None:
    if not is_file(edited.folder / MANIFEST_NAME):
        return None
    try:
        manifest = read_manifest(edited.folder)
        return {"recipe": str(manifest["recipe"].get("name")), "base": manifest["base"]["id"]}
    except (AbliterateError, KeyError, AttributeError, TypeError) as error:
        return {"recipe": None, "base": None, "error": first_line(error)}


def _dtypes(checkpoint: Checkpoint) -> tuple[str, ...]:
    return tuple(sorted({info.dtype for info in checkpoint.tensors.values()}))


def _model_type(checkpoint: Checkpoint) -> str | None:
    found = checkpoint.config.get("model_type")
    return found if isinstance(found, str) else None
