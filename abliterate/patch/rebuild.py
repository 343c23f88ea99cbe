"""From a base and a patch to the files of the conversion: what making a patch proves and applying it does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from abliterate.checkpoint.carry import carried_files, carry_over, update_config
from abliterate.checkpoint.diskio import disk_errors
from abliterate.checkpoint.extend import TensorCopy, extended_header, write_single_index
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.listing import FileRecord
from abliterate.direction.files import load_cut
from abliterate.edit.edits import build_edits
from abliterate.edit.projections import Projection
from abliterate.errors import AbliterateError, PatchError, first_line, some
from abliterate.patch.file import Description, Patch
from abliterate.publish.manifest import MANIFEST_NAME, read_manifest
from abliterate.publish.plots import draw
from abliterate.subject import Subject


@dataclass(frozen=True)
class Work:
    """What is to be done to the weights.

    Attributes:
        edits: by tensor. `copies`: tensors that untying the head adds.
    """

    edits: Mapping[str, Projection]
    copies: tuple[TensorCopy, ...]


def base_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Every file of a checkpoint that goes into a conversion, by its name there."""
    weights = [shard.path for shard in checkpoint.shards] + ([checkpoint.index] if checkpoint.index else [])
    return {path.name: path for path in weights} | carried_files(checkpoint)


def work_of(subject: Subject, patch: Patch) -> Work:
    """The edit that a patch describes.

    Raises:
        PatchError: it does not fit the model, or would edit other tensors than the patch names.
    """
    plan, edit = subject.plan, patch.about.edit
    untie = edit.head == "untied"
    if edit.head != "separate" and (not plan.tied or (untie and (not plan.shares_edit or plan.untying is None))):
        raise PatchError(f"{patch.path} has a head that is {edit.head}, which that of {subject.name} cannot become")
    cut = load_cut(patch.path, plan.hidden_size, plan.num_layers, edit.strength, edit.keep_norms)
    edits = build_edits(subject.checkpoint, plan, cut, untie)
    other = sorted(edits.keys() ^ patch.targets)
    if other:
        raise PatchError(
            f"{patch.path} edits other tensors of {subject.name} than this version would ({some(other)}); use the "
            f"version that made it, {versions_text(patch.about)}"
        )
    return Work(edits, tuple(TensorCopy(*pair) for pair in plan.untying or ()) if untie else ())


def write_rest(subject: Subject, patch: Patch, work: Work, folder: Path) -> None:
    """Writes all that is neither a shard nor the index beside several.

    Raises:
        PatchError: what the patch holds cannot be used.
        OutputError: the disk is full or cannot be written to.
    """
    checkpoint = subject.checkpoint
    carry_over(checkpoint, folder, patch.about.base.files)
    if patch.about.edit.head == "untied":
        update_config(folder, dict.fromkeys(subject.plan.tied_flags, False))
    with disk_errors(folder, sum(map(len, patch.own.values()))):
        if checkpoint.index is None:
            write_single_index(extended_header(checkpoint.shards[0], work.copies), folder)
        for name, content in patch.own.items():
            (folder / name).write_bytes(content)
        if patch.about.redrawn:
            _draw(subject, patch, folder)


def _draw(subject: Subject, patch: Patch, folder: Path) -> None:
    """Draws the plots again. The manifest is data from outside, of which only a drawing is made."""
    try:
        manifest = read_manifest(folder)
        for candidate in (manifest["selection"] or {}).get("candidates", ()):
            position, layer = candidate["position"], candidate["layer"]
            if not (-64 <= position < 0 <= layer < subject.plan.num_layers):
                raise ValueError(f"a candidate at position {position}, layer {layer}")
        draw(manifest, folder)
    except OSError:
        raise
    except (AbliterateError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise PatchError(f"{patch.path} holds a damaged {MANIFEST_NAME} ({first_line(error)}); get it again") from error


def differing(found: Mapping[str, FileRecord], wanted: Mapping[str, FileRecord]) -> list[str]:
    """Names of what is wanted, and is missing or other."""
    return [name for name, record in wanted.items() if found.get(name) != record]


def versions_text(about: Description) -> str:
    """What made the output, in words."""
    return ", ".join(f"{name} {version}" for name, version in about.tool.items() if name in ("abliterate", "torch"))
