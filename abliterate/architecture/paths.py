"""From a family's gains and skip path to the steps of one writer, with the names of the tensors that hold them."""

from collections.abc import Callable, Sequence

from abliterate.architecture.rules import StepRule
from abliterate.architecture.writer import Path, Step
from abliterate.errors import ArchitectureError

Stored = Callable[[str], str | None]
"""On-disk name of a module's weight, given the module's; None where it has none."""


def gain_path(rules: Sequence[StepRule], place: str, stored: Stored, offset: float) -> Path:
    """What stands between a writer and the stream.

    Args:
        rules: nearest to the stream first.
        place: what stands before the names of the writer's layer, or of the stem.
        stored: of norms that a layer does not have there is nothing stored, and so no step.
    """
    return tuple(step for rule in rules if (step := _step(rule, place, stored, offset)) is not None)


def _step(rule: StepRule, place: str, stored: Stored, offset: float) -> Step | None:
    if rule.module is None:
        return Step(rule.kind)
    tensor = stored(place + rule.module)
    return None if tensor is None else Step(rule.kind, tensor, 0.0 if rule.kind == "taps" else offset)


def skip_paths(
    skip: Sequence[StepRule | str], places: Sequence[str], stored: Stored, offset: float
) -> tuple[tuple[Path, ...], Callable[[int, str], Path]]:
    """What the stream passes from each point to its end.

    Args:
        skip: of the family: what it meets in a layer, in order.
        places: what stands before the names in each layer, first layer first.

    Returns:
        The paths from each layer's input and, last, the end itself; and a function from a layer's index and the name of
        a writing module to the path from where its output is added.
    """
    after: Path = ()
    boundaries: list[Path] = [after]
    joins: dict[tuple[int, str], Path] = {}
    for index in range(len(places) - 1, -1, -1):
        for item in reversed(skip):
            if isinstance(item, str):
                joins[index, item] = after
            elif (step := _step(item, places[index], stored, offset)) is not None:
                joins[index, item.module or ""] = after
                after = (*after, step)
        boundaries.append(after)

    def join(index: int, module: str) -> Path:
        named = module
        while (index, named) not in joins and "." in named:
            named = named.rpartition(".")[0]
        if (index, named) not in joins:
            raise ArchitectureError(f"the table of architectures is damaged: skip does not say where {module} adds")
        return joins[index, named]

    return tuple(reversed(boundaries)), join
