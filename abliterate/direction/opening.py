"""What prompts have in common at their start goes through the model once: for most, half of all that they are.

A causal model makes the same of a chat template's first tokens whatever follows them. They run alone, as one row, and
each prompt's own tokens continue from what layers keep of them (keys and values). Under an edit that is the same for
all rows, results are those of whole prompts up to rounding, and so are gradients.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from abliterate.calibration.model import LanguageModel, Tokens, pad
from abliterate.calibration.tour import run
from abliterate.direction.score import kl_divergence
from abliterate.errors import CalibrationError

log = logging.getLogger(__name__)

LEAST = 4
"""Tokens in common for which it is worth while."""
_ROUNDING, _ROUNDING_SHORT = 1e-4, 0.02
"""KL in nats between the two ways up to which they are one; where what is computed in has less than 32 bits."""
_ATTENTION = {"DynamicLayer", "DynamicSlidingWindowLayer"}
"""Layers of a cache that keep keys and values for each token, and nothing else."""


def in_common(prompts: Sequence[Tokens]) -> int:
    """Tokens that all prompts start with, at most all but one of the shortest."""
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[0], ordered[-1]  # all others lie between them
    end = min(map(len, prompts)) - 1
    return next((i for i in range(end) if first[i] != last[i]), end)


@dataclass(frozen=True)
class Opening:
    """Logits of prompts that start alike.

    Attributes:
        once: whether tokens in common run once; else all prompts run whole.
    """

    model: LanguageModel
    once: bool

    def logits(self, prompts: Sequence[Tokens]) -> Tensor:
        """One batch: logits [prompts, vocabulary] float32 at the last position, as those of `LanguageModel`.

        Hooks on the model have to do the same to all rows.
        """
        count = in_common(prompts) if self.once and len(prompts) > 1 else 0
        return self.model.logits(prompts) if count < LEAST else _continued(self.model, prompts, count)


def opening_of(model: LanguageModel, prompts: Sequence[Tokens]) -> Opening:
    """How prompts like these are run: two of them go both ways, and where the two differ, all run whole.

    Streamed weights would be read twice: there they run whole too.
    """
    tried = prompts[:2]
    if model.runner.streamed or len(tried) < 2 or in_common(tried) < LEAST:
        return Opening(model, False)
    with torch.inference_mode():
        once = _same(model, tried)
    log.info("the tokens that all prompts start with run once" if once else "prompts run whole")
    return Opening(model, once)


def _same(model: LanguageModel, prompts: Sequence[Tokens]) -> bool:
    """Whether logits are the same both ways, and layers keep keys and values alone."""
    whole = model.logits(prompts)
    try:
        divergence = float(kl_divergence(whole, _continued(model, prompts, in_common(prompts))).max())
    except CalibrationError as error:
        log.debug("%s", error)
        return False
    short = torch.finfo(model.dtype).bits < 32
    return divergence <= (_ROUNDING_SHORT if short else _ROUNDING)


def _continued(model: LanguageModel, prompts: Sequence[Tokens], count: int) -> Tensor:
    """Logits after tokens that go on from the first `count`, which all have in common."""
    cache = _kept(model, prompts[0][:count])
    cache.batch_repeat_interleave(len(prompts))
    rest = [tokens[count:] for tokens in prompts]
    inputs = pad(rest, model.device)
    seen = inputs["attention_mask"].new_ones(len(prompts), count)
    mask = torch.cat([seen, inputs["attention_mask"]], dim=1)
    with model.last_position_only(torch.tensor([len(tokens) for tokens in rest])):
        output = run(model.model, inputs | {"attention_mask": mask, "cache": cache, "use_cache": True})
    last: Tensor = output.logits[:, -1].float()
    return last


def _kept(model: LanguageModel, start: Tokens) -> Cache:
    """What layers keep of some tokens.

    Raises:
        CalibrationError: not keys and values alone.
    """
    with model.last_position_only(torch.tensor([len(start)])):
        output = run(model.model, pad([start], model.device) | {"use_cache": True})
    cache = getattr(output, "cache", None)
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if not isinstance(cache, Cache) or not kinds or not kinds <= _ATTENTION:
        raise CalibrationError(f"layers keep {', '.join(sorted(kinds)) or 'nothing'}")
    return cache
