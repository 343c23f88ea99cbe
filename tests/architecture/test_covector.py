"""Covectors beside autograd: what a pulled back direction does not see, the path does not turn into the direction."""

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from abliterate.architecture.covector import gain_of, pull_back
from abliterate.architecture.writer import Path, Step
from abliterate.errors import EditError

H, TOKENS = 12, 9
KINDS = st.lists(st.sampled_from(["scale", "offset", "center"]), min_size=0, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=40)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gain(seed: int, hidden: int = H) -> Tensor:
    drawn = normal(seed, hidden)
    return drawn.sign() * (0.3 + drawn.abs())


def made(kinds: list[str], seed: int, taps: int = 4) -> tuple[Path, dict[str, Tensor]]:
    """Steps of these kinds, the one nearest to the end first, and the tensors that they name."""
    steps, tensors = [], {}
    for i, kind in enumerate(kinds):
        name = f"{i}.weight"
        if kind == "center":
            steps.append(Step("center"))
        elif kind == "taps":
            steps.append(Step("taps", name))
            tensors[name] = normal(seed + i, H, 1, taps)
        else:
            steps.append(Step("scale", name, 1.0 if kind == "offset" else 0.0))
            tensors[name] = gain(seed + i) - (1.0 if kind == "offset" else 0.0)
    return tuple(steps), tensors


def forward(x: Tensor, path: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """[tokens, hidden] through the steps, the last of the path first: written without the code that is tested."""
    for step in reversed(path):
        if step.kind == "center":
            x = x - x.mean(dim=1)[:, None]
        elif step.kind == "scale":
            assert step.tensor is not None
            x = x * (tensors[step.tensor] + step.offset)
        else:
            assert step.tensor is not None
            taps = tensors[step.tensor].shape[-1]
            padded = nn.functional.pad(x.T[None], (taps - 1, 0))
            x = x + nn.functional.conv1d(padded, tensors[step.tensor], groups=H)[0].T
    return x


def gradient(c: Tensor, path: Path, tensors: Mapping[str, Tensor], seed: int = 0) -> Tensor:
    """[tokens, hidden]: of c . (the last token at the end) by every token's input."""
    x = normal(seed, TOKENS, H).requires_grad_()
    (found,) = torch.autograd.grad(forward(x, path, tensors)[-1] @ c, x)
    return found


def pulled(c: Tensor, path: Path, tensors: dict[str, Tensor]) -> Tensor:
    return pull_back(c[None], path, tensors.__getitem__)


@quick
@given(KINDS, SEEDS)
def test_scales_and_means_are_the_transposed_jacobian(kinds: list[str], seed: int) -> None:
    path, tensors = made(kinds, seed)
    c = normal(seed + 100, H)
    expected = gradient(c, path, tensors)
    assert not bool(expected[:-1].any())
    found = pulled(c, path, tensors)
    assert found.shape == (1, H) and found.dtype == torch.float64
    if path:
        torch.testing.assert_close(found[0], expected[-1] / expected[-1].norm())
    else:
        assert torch.equal(found[0], c), "nothing on the way, nothing done"


@quick
@given(SEEDS, st.integers(1, 5))
def test_a_convolution_has_a_covector_for_every_lag(seed: int, taps: int) -> None:
    path, tensors = made(["taps"], seed, taps)
    c = normal(seed + 100, H)
    expected, found = gradient(c, path, tensors)[-taps:], pulled(c, path, tensors)
    assert found.shape == (taps, H)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))


@quick
@given(st.permutations(["taps", "scale", "center", "taps"]), SEEDS, st.integers(1, 3))
def test_through_everything_the_covectors_span_every_token_s_gradient(kinds: list[str], seed: int, taps: int) -> None:
    path, tensors = made(kinds, seed, taps)
    c = normal(seed + 100, H)
    found, expected = pulled(c, path, tensors), gradient(c, path, tensors)
    assert found.shape == (taps * taps, H)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(taps * taps, dtype=torch.float64))
    basis = torch.linalg.qr(found.T).Q
    left = expected - expected @ basis @ basis.T
    assert float(left.norm()) < 1e-9 * float(expected.norm())


@quick
@given(SEEDS)
def test_a_tensor_without_the_direction_has_none_at_the_end(seed: int) -> None:
    """What it is for: the edit of a writer behind a convolution, a norm and a second gain."""
    path, tensors = made(["scale", "center", "taps", "offset"], seed, 3)
    c = normal(seed + 100, H)
    found = pulled(c, path, tensors)
    basis = torch.linalg.qr(found.T).Q
    written = normal(seed + 200, TOKENS, H)
    assert float((forward(written, path, tensors) @ c).abs().max()) > 1e-3
    clean = written - written @ basis @ basis.T
    assert float((forward(clean, path, tensors) @ c).abs().max()) < 1e-9


NORMS: list[tuple[Callable[[], nn.Module], list[str]]] = [
    (lambda: nn.LayerNorm(H, dtype=torch.float64, bias=False), ["scale", "center"]),
    (lambda: LlamaRMSNorm(H).double(), ["scale"]),
    (lambda: Gemma2RMSNorm(H).double(), ["offset"]),
]


@pytest.mark.parametrize(("build", "kinds"), NORMS, ids=["LayerNorm", "Llama", "Gemma 2"])
def test_real_norms_up_to_their_denominator(build: Callable[[], nn.Module], kinds: list[str]) -> None:
    path, tensors = made(kinds, 5)
    norm = build()
    (weight,) = norm.requires_grad_(False).parameters()
    weight.copy_(tensors["0.weight"])
    c, x = normal(1, H), 3 * normal(2, TOKENS, H) + 1
    v = pulled(c, path, tensors)[0]
    factors = (norm(x) @ c) / (x @ v)
    assert bool((factors > 0).all()), "every token has its own denominator, and no sign of its own"
    clean = x - torch.outer(x @ v, v)
    assert float((norm(clean) @ c).abs().max()) < 1e-6 < 0.1 < float((norm(x) @ c).abs().max())


def test_many_covectors_keep_apart() -> None:
    path, tensors = made(["scale", "taps"], 3, 2)
    many = normal(8, 5, H)
    found = pull_back(many, path, tensors.__getitem__)
    assert found.shape == (10, H)
    for i, c in enumerate(many):
        torch.testing.assert_close(found[2 * i : 2 * i + 2], pulled(c, path, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_gains_count_as_they_are_stored(dtype: torch.dtype) -> None:
    weight = gain(4).to(dtype)
    step = Step("scale", "w", 1.0)
    assert gain_of(step, weight).dtype == torch.float64
    torch.testing.assert_close(gain_of(step, weight), weight.double() + 1.0)
    torch.testing.assert_close(gain_of(step, weight[None, None]), weight.double() + 1.0)
    c = normal(1, H)
    expected = (weight.double() + 1.0) * c
    torch.testing.assert_close(pulled(c, (step,), {"w": weight})[0], expected / expected.norm())


def test_the_length_of_what_comes_in_does_not_matter() -> None:
    path, tensors = made(["scale", "center", "offset"], 7)
    c = normal(1, H)
    for factor in (1e-100, 1e-6, 1e6, 1e100):
        torch.testing.assert_close(pulled(factor * c, path, tensors), pulled(c, path, tensors))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_step_that_leaves_nothing(value: float) -> None:
    c = normal(1, H)
    with pytest.raises(EditError, match=r"^norm\.weight, between a writer and the stream, is zero along"):
        pulled(c, (Step("scale", "norm.weight"),), {"norm.weight": torch.full((H,), value)})
    with pytest.raises(EditError, match=r"^conv\.weight, .*, or not finite$"):
        taps = torch.full((H, 1, 2), value)
        taps[:, :, -1] = -1.0
        pulled(c, (Step("taps", "conv.weight"),), {"conv.weight": taps})


def test_a_direction_that_is_the_same_in_every_channel_has_no_part_behind_a_layer_norm() -> None:
    with pytest.raises(EditError, match=r"^the mean over channels, between a writer and the stream, is zero along"):
        pulled(torch.full((16,), 0.25, dtype=torch.float64), (Step("center"),), {})
