"""Values to bytes and back, exactly, by their types: what is stored between runs. Data only; nothing in it can run.

Known are dataclasses, tuples, lists, sequences, dicts and mappings, optional values, str, int, float (NaN and
infinities too), bool, None, `Any` for plain JSON values, and tensors of every dtype that safetensors stores.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

T = TypeVar("T")
KEY = "value"
LENGTH_BYTES = 8
_SIMPLE = (str, int, float, bool, type(None))
_SERIES: Mapping[Any, type] = {tuple: tuple, list: list, Sequence: list}
_UNIONS = (typing.Union, types.UnionType)


class KindError(TypeError):
    """Values of that type are not stored."""


class CodecError(ValueError):
    """The bytes do not hold a value of that type."""


def encode(value: Any) -> bytes:
    """A safetensors file: the tensors, and in its metadata all else as JSON.

    Raises:
        KindError: something in the value is of a kind that is not known.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_plain(value, tensors))
    content: bytes = save(tensors, {KEY: tree})
    return content


def decode(kind: Any, content: bytes) -> Any:
    """The value that was encoded.

    Args:
        kind: its type, as annotated where it is made.

    Raises:
        CodecError: the bytes hold no such value.
        KindError: the type is not known.
    """
    end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    try:
        tree = json.loads(json.loads(content[LENGTH_BYTES:end])["__metadata__"][KEY])
        return _typed(kind, tree, load(content))
    except KindError:
        raise
    except (SafetensorError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise CodecError(f"no {kind}: {error}") from error


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON takes it; tensors are put aside and stand in it as their names."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # its own memory: safetensors refuses tensors that share theirs
        tensors[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        return name
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(item, tensors) for key, item in value.items()}
    if isinstance(value, Mapping):
        return [[_plain(key, tensors), _plain(item, tensors)] for key, item in value.items()]
    if isinstance(value, tuple | list):
        return [_plain(item, tensors) for item in value]
    if type(value) in _SIMPLE:
        return value
    raise KindError(f"{type(value).__name__} is not stored")


def _typed(kind: Any, tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value of that type which `_plain` made the tree of."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if kind is Tensor:
        return tensors[tree]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: _typed(hints[name], _kept(tree, dict)[name], tensors) for name in names})  # type: ignore[operator]
    if origin in _SERIES:
        return _series(origin, of, _kept(tree, list), tensors)
    if origin in (dict, Mapping):
        pairs = tree.items() if isinstance(tree, dict) else _kept(tree, list)
        return {_typed(of[0], key, tensors): _typed(of[1], item, tensors) for key, item in pairs}
    if origin in _UNIONS and len(of) == 2 and of[1] is type(None):
        return None if tree is None else _typed(of[0], tree, tensors)
    if kind in _SIMPLE:
        return tree if kind is float and type(tree) is int else _kept(tree, kind)
    if kind is Any:
        return tree
    raise KindError(f"{kind} is not stored")


def _series(origin: Any, of: Sequence[Any], items: Sequence[Any], tensors: Mapping[str, Tensor]) -> Any:
    fixed = origin is tuple and of[-1] is not Ellipsis
    kinds = of if fixed else [of[0]] * len(items)
    return _SERIES[origin](_typed(kind, item, tensors) for kind, item in zip(kinds, items, strict=True))


def _kept(tree: Any, kind: Any) -> Any:
    """The tree, which has to be of that very type."""
    if type(tree) is not kind:
        raise ValueError(f"{kind} expected, {type(tree)} found")
    return tree
