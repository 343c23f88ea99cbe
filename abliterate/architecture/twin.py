"""Tiny twins: models of the same class and structure as a large one, small enough to probe in a second.

Every parameter is drawn at random: what initialisation leaves at its default (gains of 1, biases and gates of 0) would
hide what it does. How the sizes are chosen is in `shrink`.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from abliterate.architecture.shrink import Settings, shrink, stream_width
from abliterate.errors import ArchitectureError

# Of recurrences: what decides how fast they forget. Far from their defaults they blow up.
_NEAR_DEFAULT = re.compile(r".*(\bA_log|\bD|dt_bias|\blambda(_[qk]\d)?|time_\w+|decay\w*|recurrent_param)")
_GAIN = re.compile(r".*norm\w*\.(weight|scale|gain)")
_SELECTION_BIAS = re.compile(".*(correction_bias|expert_bias)")
_TRAINED_BUFFER = re.compile(_SELECTION_BIAS.pattern + "|.*layer_scalar")


def twin_config(config: PreTrainedConfig, overrides: Settings | None = None) -> PreTrainedConfig:
    """The config of the tiny twin of a model.

    Args:
        config: of the model.
        overrides: what the twin's settings shall be where `shrink` cannot know; inside of parts as well.

    Raises:
        ArchitectureError: no setting says how wide the model is, or the class does not take the small sizes.
    """
    settings = config.to_dict()
    try:
        if not stream_width(settings):
            raise ValueError("no setting by a known name says how wide it is")
        return type(config)(**_merged(shrink(settings), overrides or {}))
    except Exception as error:
        raise _no_twin(config, error) from error


def build_twin(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model with random parameters, for evaluation, with plain attention and plain experts.

    Args:
        config: of the twin; where the class is of its text part only, that part is taken.
        model_class: what to build.
        seed: of the parameters.
        dtype: of the parameters, which are drawn in fp32.

    Raises:
        ArchitectureError: the class cannot be built from this config.
    """
    wanted = getattr(model_class, "config_class", None)
    text = config.get_text_config(decoder=True)
    if wanted is not None and not isinstance(config, wanted) and isinstance(text, wanted):
        config = text
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class._from_config(copy.deepcopy(config), dtype=torch.float32, **plain)
    except Exception as error:
        raise _no_twin(config, error) from error
    _randomise(model, torch.Generator().manual_seed(seed))
    return cast(PreTrainedModel, model.to(dtype).eval())


def _no_twin(config: PreTrainedConfig, error: Exception) -> ArchitectureError:
    said = " ".join(str(error).split())
    return ArchitectureError(f"no tiny twin of {config.model_type} can be built: {type(error).__name__}: {said}")


def _merged(settings: Settings, overrides: Settings) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in overrides.items():
        inside = settings.get(key)
        merged[key] = _merged(inside, value) if isinstance(inside, Mapping) and isinstance(value, Mapping) else value
    return merged


def _randomise(model: nn.Module, made: torch.Generator) -> None:
    """Draws every parameter, and the buffers that are trained and stored like parameters."""
    trained = [(name, buffer) for name, buffer in model.named_buffers() if _TRAINED_BUFFER.fullmatch(name)]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *trained]:
            if tensor.is_floating_point():
                tensor.copy_(_drawn(name, tensor, made))


def _drawn(name: str, default: Tensor, made: torch.Generator) -> Tensor:
    noise = torch.randn(default.shape, generator=made)
    if _NEAR_DEFAULT.fullmatch(name):
        return default + 0.1 * noise
    if _SELECTION_BIAS.fullmatch(name):
        return 0.05 * noise  # a larger one would keep all tokens from some experts
    is_matrix = default.dim() == 2 or sum(size > 1 for size in default.shape) > 1
    if is_matrix and not _GAIN.fullmatch(name):
        return noise * (0.7 if re.search("embed|wte|wpe", name) else default.shape[-1] ** -0.5)
    return default.nan_to_num(0, 0, 0) + 0.3 * noise if name.endswith("bias") else _gains(default.shape, made)


def _gains(shape: torch.Size, made: torch.Generator) -> Tensor:
    """Gains of either sign, away from 0 and from 1, whether the norm multiplies by them or by 1 more than them."""
    low, high = torch.rand(shape, generator=made), torch.rand(shape, generator=made)
    return torch.where(torch.rand(shape, generator=made) < 0.5, 0.4 + 0.4 * low, -2 + 0.5 * high)
