"""Which modules and layers some tensors are, in few words."""

from collections.abc import Iterable, Sequence

from abliterate.architecture.rules import fold_numbers
from abliterate.difference.tensors import TensorDifference
from abliterate.errors import some

SHOWN = 6


def coverage(tensors: Sequence[TensorDifference]) -> str:
    """Such as `o_proj (layers 8–19), down_proj (layers 8–19)`."""
    groups: dict[str, list[TensorDifference]] = {}
    for tensor in tensors:
        groups.setdefault(module_of(tensor.name), []).append(tensor)
    said = [f"{module}{_layers(members)}" for module, members in groups.items()]
    return some(said, SHOWN)


def module_of(name: str) -> str:
    """The last part of a tensor's name that tells modules apart."""
    parts = [part for part in fold_numbers(name).removesuffix(".weight").split(".") if part != "*"]
    return ".".join(parts[-2:]) if parts[-1] in ("bias", "proj") else parts[-1]


def ranks(tensors: Sequence[TensorDifference]) -> str:
    """Least and largest."""
    found = sorted(tensor.rank for tensor in tensors)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _layers(tensors: Sequence[TensorDifference]) -> str:
    numbers = [number for tensor in tensors if (number := layer_of(tensor.name)) is not None]
    return f" (layers {_runs(numbers)})" if numbers else ""


def layer_of(name: str) -> int | None:
    """The first number in a name."""
    return next((int(part) for part in name.split(".") if part.isdecimal() and len(part) < 7), None)


def _runs(numbers: Iterable[int]) -> str:
    """Such as `0–3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if not runs or number > runs[-1][-1] + 1:
            runs.append([number])
        runs[-1][1:] = [number]
    return ", ".join("–".join(map(str, dict.fromkeys(run))) for run in runs)
