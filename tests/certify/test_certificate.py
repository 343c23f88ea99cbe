"""What the two measurements add up to."""

import math

import pytest

from abliterate.certify.certificate import Certificate, worst_writer
from abliterate.certify.stream import StreamResidual
from abliterate.certify.weights import WriterResidual

TOLERANCE = 1e-6


def written(name: str, after: float, tolerance: float = TOLERANCE) -> WriterResidual:
    return WriterResidual(name, "F32", 0.02, after, tolerance, after <= tolerance)


CLEAN = (written("embed", 1e-8), written("out", 0.0))
QUIET = StreamResidual((1e-8, 2e-8, 3e-8), 40, {"model.embed": 1e-8, "layers.0.out": 2e-8, "layers.1.out": 2e-8})
LOUD = StreamResidual((1e-8, 0.5, 0.4), 40, {"model.embed": 1e-8, "layers.0.out": 0.6, "layers.1.out": 2e-8})


def certificate(
    writers: tuple[WriterResidual, ...] = CLEAN, stream: StreamResidual = QUIET, leaves: str | None = None
) -> Certificate:
    return Certificate(writers, stream, None, TOLERANCE, "chat", leaves)


def test_clean_weights_and_a_clean_stream_hold() -> None:
    made = certificate()
    assert made.holds and made.exact and made.failed_writers == () and made.failure == ""
    assert made.claim == (
        "no component along r at any layer: max |h·r|/‖h‖ = 3.0e-08 over 40 tokens (tolerance 1.0e-06), "
        "and all 2 residual writers are clean"
    )


@pytest.mark.parametrize("after", [2e-6, math.nan, math.inf])
def test_one_writer_is_enough_to_fail(after: float) -> None:
    bad = written("layers.3.down", after)
    made = certificate((*CLEAN, bad, written("later", 0.5)))
    assert not made.holds and made.failed_writers[0] is bad and len(made.failed_writers) == 2
    assert made.failure == f"2 writers are above tolerance, first layers.3.down ({after:.1e})"
    assert made.claim.startswith("does not hold: ") and made.claim.endswith(made.failure)


def test_the_stream_is_enough_to_fail() -> None:
    made = certificate(stream=LOUD)
    assert not made.holds and made.failed_writers == ()
    assert made.failure == "the direction is back at the input of layer 1, written by layers.0.out"
    assert made.claim == (
        "does not hold: max |h·r|/‖h‖ = 5.0e-01 over 40 tokens (tolerance 1.0e-06); "
        "the direction is back at the input of layer 1, written by layers.0.out"
    )


@pytest.mark.parametrize("stream", [QUIET, LOUD])
def test_what_leaves_something_on_purpose_is_never_certified_but_may_be_sound(stream: StreamResidual) -> None:
    made = certificate(stream=stream, leaves="strength 0.5 leaves part of the direction on purpose")
    assert not made.holds and not made.exact and made.sound
    assert made.claim.startswith(
        "not exact: strength 0.5 leaves part of the direction on purpose; 2 residual writers have lost just that; max"
    )


def test_a_writer_that_has_not_lost_what_it_should_is_not_sound() -> None:
    bad = WriterResidual("layers.0.out", "F32", 0.02, 0.015, TOLERANCE, False, strength=0.5, left=0.01)
    made = certificate((*CLEAN, bad), leaves="on purpose")
    assert not made.sound and "1 writers have not lost what they should, first layers.0.out (1.5e-02)" in made.claim
    assert worst_writer(made.writers) is bad


def test_what_could_not_be_compared_is_said() -> None:
    unknown = WriterResidual("layers.0.out", "F32", None, 0.015, TOLERANCE, True, strength=0.5, left=None)
    claim = certificate((*CLEAN, unknown), leaves="on purpose").claim
    assert "2 residual writers have lost just that (1 could not be compared)" in claim


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_stream_that_is_not_finite_fails(bad: float, place: int) -> None:
    layers = [0.0, 0.0, 0.0]
    layers[place] = bad
    stream = StreamResidual(tuple(layers), 40, {})
    assert math.isnan(stream.worst) and not certificate(stream=stream).holds
    assert ("the final norm" if place == 2 else f"layer {place}") in certificate(stream=stream).failure


def test_the_tolerance_is_the_border() -> None:
    for value, holds in ((0.99e-6, True), (1.01e-6, False)):
        stream = StreamResidual((0.0, value, 0.0), 40, {})
        assert stream.holds(TOLERANCE) is holds and certificate(stream=stream).holds is holds
        assert (stream.first_failure(TOLERANCE) is None) is holds


@pytest.mark.parametrize(
    ("layers", "writers", "expected"),
    [
        ((0.5, 0.5, 0.5), {"embed": 0.5}, "input of layer 0, written by embed"),
        (
            (0.5, 0.5, 0.5),
            {"embed": 0.0, "layers.0.o": 0.5},
            "input of layer 0, through a module that is not a known emb",
        ),
        ((0.0, 0.5, 0.5), {"layers.0.o": 0.2, "layers.0.d": 0.3, "layers.1.o": 0.9}, "layer 1, written by layers.0.d"),
        ((0.0, 0.5, 0.5), {"layers.1.o": 0.9}, "layer 1, through a module that is not a known writer of layer 0"),
        ((0.0, 0.0, 0.5), {"layers.0.o": 0.0, "layers.1.d": 0.3}, "the final norm's input, written by layers.1.d"),
        ((0.0, 0.0, 0.5), {"layers.1.d": 0.0}, "final norm's input, through a module that is not a known writer of"),
    ],
)
def test_the_first_failure_is_named(layers: tuple[float, ...], writers: dict[str, float], expected: str) -> None:
    found = StreamResidual(layers, 40, writers).first_failure(TOLERANCE)
    assert found is not None and expected in found


def test_the_worst_writer_is_the_nearest_to_its_own_tolerance() -> None:
    coarse, fine = written("bf16", 1e-5, 1e-4), written("fp32", 9e-7)
    assert worst_writer([coarse, fine]) is fine and worst_writer([fine, coarse]) is fine
    assert worst_writer([]) is None
