"""Ablation of several directions, in part, and in some layers: against plain linear algebra and plain hooks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from abliterate.architecture.writer import Step
from abliterate.calibration.basis import orthonormal
from abliterate.calibration.hooks import NOTHING, Steer, Stream, ablate, steered
from abliterate.calibration.transport import Transport
from tests.calibration.test_model import gathered, model  # noqa: F401
from tests.resident import HIDDEN, llama, random_prompts, random_units, resident

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 3))
def test_a_basis_is_orthonormal_and_spans_the_first_vectors(seed: int, k: int, rows: int) -> None:
    vectors = torch.randn(rows, k, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = orthonormal(vectors)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(k, dtype=torch.float64).expand(rows, k, k))
    for j in range(1, k + 1):
        left = vectors[:, :j] - vectors[:, :j] @ basis[:, :j].mT @ basis[:, :j]
        assert float(left.abs().max()) < 1e-9


def test_what_lies_in_the_span_already_becomes_zero() -> None:
    a, b = random_units(2)
    basis = orthonormal(torch.stack([a, 2 * a, torch.zeros(HIDDEN), b, a - 3 * b]))
    assert [float(row.norm()) for row in basis] == pytest.approx([1, 0, 0, 1, 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.floats(0, 2, width=32))
def test_ablation_is_the_projection(seed: int, k: int, strength: float) -> None:
    drawn = torch.Generator().manual_seed(seed)
    basis = orthonormal(torch.randn(2, k, 12, generator=drawn, dtype=torch.float64))
    hidden = torch.randn(2, 7, 12, generator=drawn, dtype=torch.float64)
    removed = ablate(basis, strengths=torch.tensor([strength, 1.0]))(hidden)
    share = torch.tensor([strength, 1.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(removed, hidden - share * (hidden @ basis.mT @ basis))


def test_one_direction_gives_the_same_bits_alone_as_a_basis_and_padded() -> None:
    hidden, (r, q) = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(1)), random_units(2)
    expected = hidden[0] - (hidden[0] * r).sum(-1, keepdim=True) * r
    padded = torch.stack([torch.stack([r, torch.zeros(HIDDEN)]), orthonormal(torch.stack([r, q]))])
    for rows in (r.expand(2, -1), r.expand(2, 1, -1), padded):
        assert torch.equal(ablate(rows)(hidden)[0], expected)


def test_flat_and_positionwise_outputs_take_bases_as_well() -> None:
    hidden, basis = torch.randn(2, 5, HIDDEN), orthonormal(torch.stack([random_units(3), random_units(3, seed=1)]))
    expected = hidden - hidden @ basis.mT @ basis
    torch.testing.assert_close(ablate(basis)(hidden.flatten(0, 1)).view_as(hidden), expected, **CLOSE)
    shared = torch.randn(5, HIDDEN)
    expected = shared - shared @ basis.mT @ basis
    torch.testing.assert_close(ablate(basis, positionwise=True)(shared), expected, **CLOSE)


def test_rows_with_more_and_fewer_directions_share_a_batch() -> None:
    made, prompts, units = resident(llama(), 12), random_prompts(6), random_units(3)
    basis = orthonormal(units)
    steers = [
        Steer(ablate=basis),
        Steer(ablate=units[0]),
        NOTHING,
        Steer(ablate=basis[:2]),
        Steer(ablate=basis),
        NOTHING,
    ]
    logits, hidden = gathered(made, prompts, steers=steers, positions=4)
    assert hidden is not None
    size = float(hidden.norm(dim=-1).max())
    for row, steer in enumerate(steers):
        alone, _ = gathered(made, [prompts[row]], steers=[steer])
        torch.testing.assert_close(logits[row], alone[0], **CLOSE)
        for unit in basis if steer.ablate is None else orthonormal(steer.ablate.reshape(-1, HIDDEN)):
            along = float((hidden[row] @ unit).abs().max())
            assert (along < 1e-5 * size) == (steer.ablate is not None)


def test_a_share_is_taken_off() -> None:
    """Of the embedding, which reaches the first layer as it is, half along r; twice the strength takes all."""
    made, prompts, r = resident(llama()), random_prompts(3), random_units(1)[0]
    _, plain = gathered(made, prompts, positions=3)
    for strength in (0.25, 1.0, 1.5):
        _, seen = gathered(made, prompts, steers=[Steer(ablate=r, strength=strength)] * 3, positions=3)
        assert seen is not None and plain is not None
        torch.testing.assert_close(seen[:, :, 0] @ r, (1 - strength) * (plain[:, :, 0] @ r), **CLOSE)
    whole, _ = gathered(made, prompts, steers=[Steer(ablate=r)] * 3)
    mixed, _ = gathered(
        resident(made.model, 3), prompts, steers=[Steer(ablate=r), Steer(ablate=r, strength=0.0), NOTHING]
    )
    torch.testing.assert_close(mixed[0], whole[0], **CLOSE)
    torch.testing.assert_close(mixed[1:], gathered(made, prompts)[0][1:], **CLOSE)


def test_a_window_ablates_what_its_layers_add() -> None:
    made, prompts, r = resident(llama(), 6), random_prompts(6), random_units(1)[0]
    windows = [range(0), range(1), range(1, 3), range(2, 3), None, range(3)]
    _, hidden = gathered(made, prompts, steers=[Steer(ablate=r, layers=window) for window in windows], positions=3)
    _, plain = gathered(made, prompts, positions=3)
    assert hidden is not None and plain is not None
    along, before = hidden @ r, plain @ r
    torch.testing.assert_close(along[0], before[0], **CLOSE)
    for row, window in enumerate(windows):
        if window is None:
            assert float(along[row].abs().max()) < 1e-4
            continue
        for layer in (0, 1):
            grows = float((along[row, :, layer + 1] - along[row, :, layer]).abs().max()) > 1e-3
            assert grows == (layer not in window), (row, layer)
        torch.testing.assert_close(along[row, :, 0], before[row, :, 0], **CLOSE)


def test_writers_know_their_layers() -> None:
    made = resident(llama())
    assert made.stream.layer_of_writers() == [None, 0, 0, 1, 1, 2, 2]
    foreign = Stream((nn.Linear(2, 2),), ("adapter",), (nn.Identity(),), 2)
    assert foreign.layer_of_writers() == [None]


def test_a_tied_head_is_outside_every_window() -> None:
    made, prompts, r = resident(llama(), tied_head=True), random_prompts(2), random_units(1)[0]
    free = resident(made.model)
    steers = [Steer(ablate=r, layers=range(1, 2))] * 2
    torch.testing.assert_close(gathered(made, prompts, steers=steers)[0], gathered(free, prompts, steers=steers)[0])
    steers = [Steer(ablate=r, strength=0.5)] * 2
    assert not torch.allclose(gathered(made, prompts, steers=steers)[0], gathered(free, prompts, steers=steers)[0])


def test_a_basis_behind_gains_is_pulled_back_as_a_whole() -> None:
    """Behind a gain g what is removed is the span of g * q, of which the rows are not orthogonal."""
    gain = 0.5 + torch.rand(HIDDEN, generator=torch.Generator().manual_seed(3))
    transport = Transport([(Step("scale", "g"),)], [()], lambda _: gain)
    writer = nn.Identity()
    stream = Stream((writer,), ("w",), (writer,), HIDDEN, transport=transport)
    basis = orthonormal(random_units(3))
    hidden = torch.randn(2, 5, HIDDEN)
    with steered(stream, [Steer(ablate=basis), NOTHING]):
        left: Tensor = writer(hidden)
    torch.testing.assert_close((left[0] * gain) @ basis.T, torch.zeros(5, 3), **CLOSE)
    assert torch.equal(left[1], hidden[1])
    dimensions = torch.linalg.matrix_rank(hidden[0] - left[0], rtol=1e-4)
    assert int(dimensions) == 3
