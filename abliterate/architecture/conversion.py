"""What transformers does not promise to keep: its conversion of stored tensors into a model's parameters.

Nothing else here uses it. A canary in the tests loads every way and compares; where it has changed so much that this
module cannot be used, `usable` says so and models are loaded through public interfaces alone, which is slower.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars  # type: ignore[attr-defined]
from transformers.utils import logging as transformers_logging

from abliterate.errors import CheckpointError, first_line

log = logging.getLogger(__name__)

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
    )
    from transformers.modeling_utils import LoadStateDictConfig
except ImportError as error:
    _CHANGED: str | None = first_line(error)
else:
    _CHANGED = None


def usable() -> bool:
    """Whether the interfaces are there and do what this module takes them to do, tried on a tiny model."""
    return trouble() is None


@functools.cache
def trouble() -> str | None:
    """What is not as it should be, in one line; None where all is well. Tried once."""
    if _CHANGED is not None:
        reason: str | None = _CHANGED
    else:
        try:
            reason = _tried()
        except Exception as error:  # of an interface that has changed anything may be raised
            reason = first_line(error)
    if reason is not None:
        log.warning("transformers %s is not as it was (%s): layers load the slow way", transformers.__version__, reason)
    return reason


def _tried() -> str | None:
    """Fills a tiny model; says what came out wrong."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    made = torch.Generator().manual_seed(0)
    stored = {name: torch.randn(meta.shape, generator=made) for name, meta in model.state_dict().items()}
    Filler(model, torch.bfloat16).fill(stored, torch.device("cpu"))
    filled = model.state_dict()
    wrong = next((name for name in stored if not torch.equal(filled[name], stored[name].bfloat16())), None)
    return None if wrong is None else f"{wrong} is not filled as it should be"


def steps_of(model: Any) -> tuple[list[Any], list[Any]]:
    """Renamings and converters that stored names go through on their way into the model, each in order.

    Both empty where that cannot be told: stored names are then taken to be the model's own.
    """
    if _CHANGED is not None:
        return [], []
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    return renamings, [step for step in mapping if isinstance(step, WeightConverter)]


class Filler:
    """Puts stored tensors into a model whose parameters are on the meta device.

    Args:
        model: of transformers.
        dtype: to compute in; parameters that the architecture keeps in fp32 stay so.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._mapping = get_model_conversion_mapping(model)
        self._plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)

    @property
    def kept(self) -> Sequence[str]:
        """Patterns of parameters that are kept in another dtype."""
        return tuple(self._plan)

    def fill(self, tensors: Mapping[str, Any], device: torch.device) -> None:
        """Loads tensors by their stored names; values may be slices that are read only now.

        Raises:
            CheckpointError: one does not fit.
        """
        # A device map that names the disk makes transformers load one tensor after another, and hold no more than one.
        devices = {"": device, "one at a time": "disk"}
        settings = LoadStateDictConfig(
            weight_mapping=self._mapping, dtype=self._dtype, dtype_plan=dict(self._plan), device_map=devices
        )
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), settings)
        for problems in (info.conversion_errors, info.mismatched_keys, info.error_msgs):
            if problems:
                raise CheckpointError(f"the weights do not fit {type(self._model).__name__}: {sorted(problems)[0]}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own progress bars out of ours; those of the Hub client, which it moves along, stay as set."""
    shown, hidden = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        if hidden:
            disable_progress_bars()
