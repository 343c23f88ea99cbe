"""Whether a checkpoint fills transformers' own model of its config: nothing missing, left over, or of another shape."""

from collections import Counter
from collections.abc import Sequence

from abliterate.architecture.account import Match
from abliterate.architecture.blueprint import Blueprint
from abliterate.architecture.rules import fold_numbers
from abliterate.errors import ArchitectureError


def check_complete(matches: Sequence[Match], blueprint: Blueprint, model_type: str) -> None:
    """Holds the stored tensors against the parameters.

    Raises:
        ArchitectureError: naming the first tensor that does not fit.
    """
    for match in matches:
        _check_used(match, blueprint, model_type)
    filled = [name for match in matches for name in match.place.parameters]
    missing = blueprint.missing(filled)
    if missing:
        raise ArchitectureError(
            f"tensor {missing[0]} is missing: {model_type} with this config.json has it; the checkpoint is incomplete, "
            "renamed, or of another architecture"
        )
    _check_experts(matches, blueprint)


def _check_used(match: Match, blueprint: Blueprint, model_type: str) -> None:
    """A tensor that transformers uses has its parameter's shape; one that it does not use cannot be of the decoder."""
    info, place = match.info, match.place
    if place.parameters and not place.converted:
        wanted = blueprint.shapes[place.parameters[0]]
        if info.shape != wanted:
            raise ArchitectureError(
                f"tensor {info.name} has shape {list(info.shape)}; {model_type} with this config.json has it as "
                f"{list(wanted)}"
            )
    known = match.rule is not None and (match.ahead or match.rule.role in ("inside", "outside"))
    if not place.parameters and not known and blueprint.hidden_size in info.shape:
        raise ArchitectureError(
            f"tensor {info.name} {list(info.shape)} is not accounted for: {model_type} with this config.json has no "
            "such tensor, it may write to the residual stream, and no edit could be called exact"
        )


def _check_experts(matches: Sequence[Match], blueprint: Blueprint) -> None:
    """Of what is put together when it is loaded nothing is missing, and every piece has its shape."""
    pieces: dict[str, list[Match]] = {}
    for match in matches:
        if match.place.converted and match.place.parameters:
            pieces.setdefault(match.place.parameters[0], []).append(match)
    for parameter, found in pieces.items():
        _check_pieces(parameter, found, blueprint)


def _check_pieces(parameter: str, found: Sequence[Match], blueprint: Blueprint) -> None:
    place = found[0].place
    counts = Counter(match.place.source for match in found)
    absent = [source for source in place.sources if source not in counts]
    if absent:
        raise ArchitectureError(f"nothing is stored of {absent[0]} for {parameter}: the checkpoint is incomplete")
    if not place.stacked:
        return
    sizes = [blueprint.shapes[name][0] for name in place.parameters]
    for match in found:
        count = counts[match.place.source]
        if count not in (sizes[0], sum(sizes)):
            raise ArchitectureError(
                f"{fold_numbers(match.info.name)} is stored {count} times for {parameter}, which stacks {sizes[0]}: "
                "the checkpoint is incomplete"
            )
        _check_slice(match, blueprint.shapes[parameter], len(place.sources))


def _check_slice(match: Match, whole: tuple[int, ...], parts: int) -> None:
    """One expert's tensor is a slice of the parameter, or one of the parts that are laid side by side in it."""
    wanted = (whole[1] // parts, *whole[2:])
    if not match.place.turned and match.info.shape != wanted:
        raise ArchitectureError(
            f"tensor {match.info.name} has shape {list(match.info.shape)}; it should be {list(wanted)}, a slice of "
            f"{match.place.parameters[0]} {list(whole)}"
        )
