"""Whatever is stored comes back exactly, and what is not that comes back as an error."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.certify.stream import StreamResidual
from abliterate.codec import CodecError, decode, encode
from abliterate.direction.means import Mean
from abliterate.direction.scoring import Scores

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@dataclass(frozen=True)
class Inner:
    number: float
    text: str | None


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    pair: tuple[int, str]
    scores: dict[tuple[int, int], list[float]]
    by_name: Mapping[str, bool]
    words: Sequence[str]
    tensor: Tensor | None
    plain: Any


def same(left: Any, right: Any) -> bool:
    """Of the same types throughout, and the same bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (left, math.copysign(1, left)) == (
            right,
            math.copysign(1, right),
        )
    if isinstance(left, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        # without elements there are no bits, and strides may be anything
        bits = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (left, right) if tensor.numel()]
        return not bits or torch.equal(*bits)
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same(a, c) and same(b, d) for (a, b), (c, d) in zip(left.items(), right.items(), strict=True)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "__dataclass_fields__"):
        return all(same(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__)
    return bool(left == right)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 3
    values = values.where(values < 5, torch.tensor(draw(st.sampled_from([math.nan, math.inf, -0.0]))))
    return values.nan_to_num(0, 1, 0).abs().to(dtype) if not dtype.is_floating_point else values.to(dtype)


outers = st.builds(
    Outer,
    st.lists(st.builds(Inner, st.floats(), st.none() | st.text())).map(tuple),
    st.tuples(st.integers(), st.text()),
    st.dictionaries(st.tuples(st.integers(), st.integers()), st.lists(st.floats())),
    st.dictionaries(st.text(), st.booleans()),
    st.lists(st.text()),
    st.none() | tensors(),
    JSON,
)


@settings(max_examples=40, deadline=None)
@given(outers)
def test_everything_comes_back(value: Outer) -> None:
    assert same(decode(Outer, encode(value)), value)


@settings(max_examples=40, deadline=None)
@given(outers)
def test_the_same_value_has_the_same_bytes(value: Outer) -> None:
    """The hash of a stage that is done again is that of the first time, so that what came after it stays good."""
    assert encode(value) == encode(value) == encode(decode(Outer, encode(value)))


def test_what_the_pipeline_stores() -> None:
    mean = Mean(torch.randn(2, 3, 4, dtype=torch.float64).transpose(0, 1), 9, 10)
    back = decode(Mean, encode(mean))
    assert back.value.dtype == torch.float64 and torch.equal(back.value, mean.value) and back.kept == 9
    residual = StreamResidual((0.1, math.nan, math.inf), 7, {"b": 1e-300, "a": -0.0})
    assert same(decode(StreamResidual, encode(residual)), residual)
    scores = Scores({(-1, 3): [0.1, math.nan]}, {}, {(-2, 0): []}, 12, (torch.eye(2)[:, :1], [0.5, -math.inf]))
    assert same(decode(Scores, encode(scores)), scores)
    for ids in ((3, 1), (), None):
        assert decode(tuple[int, ...] | None, encode(ids)) == ids


def test_a_tensor_that_others_share_memory_with() -> None:
    whole = torch.arange(6.0)
    first, second = decode(tuple[Tensor, Tensor], encode((whole[:3], whole)))
    assert torch.equal(first, whole[:3]) and torch.equal(second, whole)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), torch.nn.Linear(1, 1), 1j])
def test_what_is_not_known_is_not_stored(value: object) -> None:
    with pytest.raises(TypeError, match="is not stored"):
        encode({"key": [value]})


@pytest.mark.parametrize("kind", [set[int], int | str, bytes])
def test_types_that_are_not_known(kind: Any) -> None:
    with pytest.raises(TypeError, match="is not stored"):
        decode(kind, encode("x"))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("x", int), (1, str), (1.0, int), (True, int), (1, bool), (None, int), ([1], int),
        ((1, 2), tuple[int, int, int]),
        ([1], dict[int, int]), ([1], Tensor),
        ({"number": 1.0}, Inner), ([1], Inner), (3, Tensor), ("0", Tensor), ([[1]], dict[int, int]), (1, list[int]),
    ],
)  # fmt: skip
def test_another_type_is_told(value: object, kind: Any) -> None:
    with pytest.raises(CodecError):
        decode(kind, encode(value))


@given(st.binary(max_size=64))
@example(b"\0" * 8 + b"10")
@example(b"\0" * 8)
def test_bytes_that_nobody_wrote(content: bytes) -> None:
    with pytest.raises(CodecError):
        decode(Outer, content)


@given(st.integers(0, 400))
def test_bytes_that_end_early(length: int) -> None:
    content = encode(Mean(torch.ones(3, dtype=torch.float64), 1, 2))
    if length < len(content):
        with pytest.raises(CodecError):
            decode(Mean, content[:length])
