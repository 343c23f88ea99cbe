"""A model made ready to have its gradients taken: a copy, and the tensors in it that may write to the stream."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.errors import ArchitectureError

_WIDTH_KEYS = ("hidden_size", "d_model", "n_embd", "emb_dim", "dim")
_PLAIN_TOKENS = (6, 40)


def stream_width(model: nn.Module) -> int:
    """The width of the residual stream, as the config says.

    Raises:
        ArchitectureError: it does not.
    """
    text = _text_config(model)
    for key in _WIDTH_KEYS:
        if isinstance(width := getattr(text, key, None), int):
            return width
    raise ArchitectureError(f"the model's config does not name the width of its stream ({', '.join(_WIDTH_KEYS)})")


def some_tokens(model: nn.Module, width: int, seed: int) -> Tensor:
    """Token ids [rows, length] without a special meaning, of a shape that has no dimension of the stream's width."""
    rows = 2 * getattr(_text_config(model), "num_codebooks", 1)
    length = next(length for length in (16, 15, 14) if width not in (rows, length, rows * length))
    return torch.randint(*_PLAIN_TOKENS, (rows, length), generator=torch.Generator().manual_seed(seed))


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def prepared(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy to run in this dtype, without a cache."""
    model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    configs: tuple[Any, ...] = (getattr(model, "config", None), _text_config(model))
    for config in configs:
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return model


def tensors_of(model: nn.Module, width: int, thorough: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By run-time name, what a checkpoint stores (parameters, buffers), and constants of width that it does not."""
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    if not thorough:
        return dict(parameters), {}
    kept, others = model.state_dict().keys(), dict(model.named_buffers())
    for place, module in model.named_modules():
        loose = {f"{place}.{key}": value for key, value in vars(module).items() if isinstance(value, Tensor)}
        others |= {name.removeprefix("."): value for name, value in loose.items()}
    wide = {n: t for n, t in others.items() if t.is_floating_point() and t.is_leaf and width in t.shape}
    stored = {name: tensor for name, tensor in wide.items() if name in kept}
    return {**parameters, **stored}, {name: tensor for name, tensor in wide.items() if name not in kept}
