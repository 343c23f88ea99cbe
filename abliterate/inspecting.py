"""`abliterate inspect`: what a checkpoint's manifest claims, and whether its files bear that out. No model is run."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from abliterate.architecture.writer import Plan
from abliterate.certify.weights import WriterResidual, writer_residuals
from abliterate.checkpoint.files import DIRECTION_FILE, Checkpoint, open_checkpoint
from abliterate.checkpoint.glimpse import glimpse
from abliterate.checkpoint.locate import Source
from abliterate.checkpoint.ondemand import located_together
from abliterate.checkpoint.regular import is_file
from abliterate.direction.files import load_cut
from abliterate.errors import AbliterateError, CheckpointError, some
from abliterate.progress import SILENT, Progress
from abliterate.publish.manifest import MANIFEST_NAME, read_manifest
from abliterate.subject import plan_of
from abliterate.traffic import tell_reading
from abliterate.verification import mismatches

AGREES = 1e-4
"""How far a share that is measured again may be from the one written down, relative, beyond the last digits."""
NAMES = 5


@dataclass(frozen=True)
class Check:
    """One claim held against the files.

    Attributes:
        claim: what was looked at. `holds`: None where it could not be checked. `said`: what was found, in one line.
    """

    claim: str
    holds: bool | None
    said: str


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, says of itself, and bears out.

    Attributes:
        name: Hub id or folder. `facts`: from headers and configuration.
        plan: None where the architecture is not known (`unknown` says why).
        manifest: what it claims; None without a manifest, and then there is nothing to check.
        checks: of its claims.
        residuals: every edited writer along what was to be removed, measured on the files.
    """

    name: str
    facts: Mapping[str, Any]
    plan: Plan | None
    unknown: str | None
    manifest: Mapping[str, Any] | None
    checks: tuple[Check, ...]
    residuals: tuple[WriterResidual, ...]

    @property
    def holds(self) -> bool:
        """Whether no claim is refuted."""
        return all(check.holds is not False for check in self.checks)


def inspect(
    checkpoint: str,
    *,
    revision: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    cache_limit: int | None = None,
    progress: Progress = SILENT,
) -> Inspection:
    """Holds a checkpoint's manifest against its files. Of a Hub model without a manifest no weights are fetched.

    Args:
        checkpoint: a folder or a Hub id.
        base: the checkpoint that it is said to be made from, to compare as well.
        cache_limit: bytes of shards of Hub models, of both together, that may be on the disk at once; None downloads
            them whole.

    Raises:
        CheckpointError: it is missing or damaged, or its manifest cannot be read.
    """
    with glimpse(checkpoint, revision) as source:
        claims = is_file(source.folder / MANIFEST_NAME)
        if not claims:
            return _inspected(source, trust_remote_code)
    wanted = [(checkpoint, revision), *([(base, None)] if base is not None else [])]
    with located_together(wanted, cache_limit, progress) as (source, *bases):
        return _held_against(source, bases[0] if bases else None, trust_remote_code, progress)


def _held_against(source: Source, base: Source | None, trust_remote_code: bool, progress: Progress) -> Inspection:
    """What the manifest claims, looked at."""
    described = _inspected(source, trust_remote_code)
    manifest = read_manifest(source.folder)
    opened = open_checkpoint(source.folder, source.keeper)
    before = open_checkpoint(base.folder, base.keeper) if base is not None else None
    called = {source.called: opened} | ({base.called: before} if base is not None and before is not None else {})
    _tell_traffic(called, described.plan)
    residuals: list[WriterResidual] = []
    try:
        checks = tuple(_checks(opened, described.plan, manifest, before, residuals, progress))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{source.folder / MANIFEST_NAME} is damaged; convert the base model again") from error
    return Inspection(
        described.name, described.facts, described.plan, described.unknown, manifest, checks, tuple(residuals)
    )


def _tell_traffic(checkpoints: Mapping[str, Checkpoint], plan: Plan | None) -> None:
    """Hashes are what the Hub vouches for; of weights, the writers' are read, and gains before."""
    writers, both = plan.edited if plan is not None else (), checkpoints.values()
    steps = [(each.shard_of(w.tensor),) for w in writers for each in both if w.tensor in each.tensors]
    tell_reading(checkpoints, steps, 1 + any(writer.gain or writer.skip for writer in writers))


def _inspected(source: Source, trust_remote_code: bool) -> Inspection:
    """From headers alone."""
    opened = open_checkpoint(source.folder, source.keeper)
    plan, unknown = None, None
    try:
        plan = plan_of(opened, trust_remote_code, inexact=True)
    except AbliterateError as error:
        unknown = str(error)
    return Inspection(source.name, _facts(opened, plan), plan, unknown, None, (), ())


def _facts(checkpoint: Checkpoint, plan: Plan | None) -> dict[str, Any]:
    infos = checkpoint.tensors.values()
    dtypes = sorted({info.dtype for info in infos})
    return {
        "model_type": checkpoint.config.get("model_type"),
        "tensors": len(checkpoint.tensors),
        "shards": len(checkpoint.shards),
        "bytes": checkpoint.nbytes,
        "parameters": sum(info.numel for info in infos),
        "dtypes": {dtype: sum(info.numel for info in infos if info.dtype == dtype) for dtype in dtypes},
        "layers": plan.num_layers if plan else None,
        "hidden_size": plan.hidden_size if plan else None,
        "writers": len(plan.writers) if plan else None,
        "tied": plan.tied if plan else None,
        "direction": is_file(checkpoint.folder / DIRECTION_FILE),
    }


def _checks(
    checkpoint: Checkpoint,
    plan: Plan | None,
    manifest: Mapping[str, Any],
    base: Checkpoint | None,
    residuals: list[WriterResidual],
    progress: Progress,
) -> Iterator[Check]:
    """Every claim, cheap ones first; `residuals` is filled on the way."""
    yield _shards(checkpoint, manifest["output"])
    yield _architecture(checkpoint, plan, manifest)
    yield _writers_known(plan, manifest["edit"])
    yield _config(checkpoint, manifest["edit"])
    yield from _hashes(checkpoint, manifest, progress)
    yield from _base(base, manifest["base"], progress)
    try:
        residuals += _residuals(checkpoint, plan, manifest["edit"], base)
    except AbliterateError as error:
        yield Check("removed", None, f"not measured: {error}")
        return
    yield _removed(residuals, manifest)
    yield _recorded(residuals, manifest["edit"])


def _shards(checkpoint: Checkpoint, output: Mapping[str, Any]) -> Check:
    """Names and sizes."""
    there = {header.path.name: header.file_size for header in checkpoint.shards}
    said = {str(shard["name"]): int(shard["bytes"]) for shard in output["shards"]}
    wrong = sorted(name for name in {**there, **said} if there.get(name) != said.get(name))
    if wrong:
        return Check("shards", False, f"not there, or of another size: {some(wrong, NAMES)}")
    return Check("shards", True, f"{len(said)} as named, {sum(said.values()):,} bytes")


def _architecture(checkpoint: Checkpoint, plan: Plan | None, manifest: Mapping[str, Any]) -> Check:
    said = manifest["base"]["model_type"], manifest["direction"]["hidden_size"]
    found = checkpoint.config.get("model_type"), plan.hidden_size if plan else None
    if said[0] != found[0] or (plan is not None and said[1] != found[1]):
        return Check("architecture", False, f"said {said[0]}, {said[1]} wide; config.json has {found[0]}, {found[1]}")
    return Check("architecture", True, f"{found[0]}, {said[1]} wide")


def _writers_known(plan: Plan | None, edit: Mapping[str, Any]) -> Check:
    """The edited tensors are writers that the plan knows, and none of those is left out that the claim covers."""
    if plan is None:
        return Check("writers", None, "the architecture is not known, so the list of writers could not be checked")
    said = {str(writer["tensor"]) for writer in edit["writers"]}
    known = {writer.tensor for writer in plan.edited}
    if strange := sorted(said - known):
        return Check("writers", False, f"no residual writers: {some(strange, NAMES)}")
    left = sorted(known - said)
    if left and edit["strength"] is not None:
        return Check("writers", False, f"not among those edited: {some(left, NAMES)}")
    return Check("writers", True, f"{len(said)} of {len(known)} edited")


def _config(checkpoint: Checkpoint, edit: Mapping[str, Any]) -> Check:
    """config.json has the values that the edit set, and the tensors that it added are there."""
    changes = dict(edit["config_changes"])
    wrong = [key for key, value in changes.items() if _dotted(checkpoint.config, key) != value]
    absent = [str(name) for name in edit["added"] if name not in checkpoint.tensors]
    if wrong or absent:
        said = [f"{key} is {_dotted(checkpoint.config, key)!r}, not {changes[key]!r}" for key in wrong]
        return Check("config", False, "; ".join(said + [f"{name} is not there" for name in absent]))
    return Check("config", True, f"{len(changes)} changed keys and {len(edit['added'])} added tensors are there")


def _dotted(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _hashes(checkpoint: Checkpoint, manifest: Mapping[str, Any], progress: Progress) -> Iterator[Check]:
    direction = {DIRECTION_FILE: manifest["direction"]["sha256"]}
    yield _hash_check("direction", checkpoint, direction, progress)
    shards = {str(shard["name"]): shard["sha256"] for shard in manifest["output"]["shards"]}
    yield _hash_check("hashes", checkpoint, shards, progress)


def _hash_check(claim: str, checkpoint: Checkpoint, said: Mapping[str, str | None], progress: Progress) -> Check:
    named = {name: wanted for name, wanted in said.items() if wanted}
    if not named:
        return Check(claim, None, "the manifest has no hashes of the weights (--no-hash)")
    wrong = mismatches(checkpoint, named, progress)
    if wrong:
        return Check(claim, False, f"not the bytes that were written: {some(wrong, NAMES)}")
    return Check(claim, True, f"sha256 of {len(named)} file{'s' * (len(named) > 1)} as written down")


def _base(base: Checkpoint | None, said: Mapping[str, Any], progress: Progress) -> Iterator[Check]:
    if base is None:
        return
    there = {header.path.name: header.file_size for header in base.shards}
    if there != {str(shard["name"]): shard["bytes"] for shard in said["shards"]}:
        yield Check("base", False, "the base given has other shards than the one that was read")
        return
    yield _hash_check("base", base, {str(s["name"]): s["sha256"] for s in said["shards"]}, progress)


def _residuals(
    checkpoint: Checkpoint, plan: Plan | None, edit: Mapping[str, Any], base: Checkpoint | None
) -> tuple[WriterResidual, ...]:
    if plan is None:
        raise CheckpointError("the architecture is not known")
    keep, strength = edit.get("removes", {}).get("norms") == "kept", edit["strength"]
    path, whole = checkpoint.folder / DIRECTION_FILE, 1.0 if strength is None else float(strength)
    cut = load_cut(path, plan.hidden_size, plan.num_layers, whole, keep)
    if base is not None and not _alike(checkpoint, base, plan):
        base = None
    return writer_residuals(checkpoint, plan, cut, base)


def _alike(checkpoint: Checkpoint, base: Checkpoint, plan: Plan) -> bool:
    """Whether the base has every writer, of the same shape."""
    shapes = [[each.tensors[w.tensor].shape if w.tensor in each.tensors else None for w in plan.edited]
              for each in (checkpoint, base)]  # fmt: skip
    return shapes[0] == shapes[1]


def _removed(residuals: list[WriterResidual], manifest: Mapping[str, Any]) -> Check:
    """What the certificate says of the weights."""
    claimed = bool(manifest["certificate"]["holds"])
    failed = [residual.tensor for residual in residuals if not residual.holds]
    if manifest["edit"]["inexact"] or not claimed:
        return Check("removed", None, "the manifest does not claim that the certificate holds")
    if failed:
        return Check("removed", False, f"more is left along the direction than rounding leaves: {some(failed, NAMES)}")
    told = [residual for residual in residuals if residual.left is not None]
    worst = max(told, key=lambda r: abs(r.after - (r.left or 0.0)) / r.tolerance, default=None)
    if worst is None:
        return Check("removed", None, "what a strength other than 1 leaves can only be told with --base")
    said = f"worst of {len(told)} writers {worst.after:.3g}, tolerance {worst.tolerance:.3g} ({worst.tensor})"
    return Check("removed", True, said)


def _recorded(residuals: list[WriterResidual], edit: Mapping[str, Any]) -> Check:
    """Measured again, every share is what was written down."""
    said = {str(w["tensor"]): (float(w["residual_after"]), float(w["tolerance"])) for w in edit["writers"]}
    found = {residual.tensor: residual.after for residual in residuals if residual.tensor in said}
    wrong = [name for name, after in found.items() if _differs(after, *said[name])]
    if wrong or len(found) < len(said):
        return Check(
            "residuals", False, f"not those written down: {some(wrong or sorted(set(said) - set(found)), NAMES)}"
        )
    return Check("residuals", True, f"{len(found)} shares along the direction are those written down")


def _differs(found: float, said: float, tolerance: float) -> bool:
    room = AGREES * max(abs(found), abs(said)) + AGREES * tolerance
    return not math.isfinite(found) or abs(found - said) > room
