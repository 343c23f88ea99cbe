"""Whether a twin gives the same numbers streamed layer by layer as in memory, bit by bit."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate import RunOptions
from abliterate.calibration.hooks import Steer
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.runner import Streamed
from abliterate.checkpoint.locate import Source
from abliterate.direction.firstorder import first_order_bypass
from abliterate.errors import AbliterateError
from abliterate.subject import load_model, subject_at
from tests import pico
from tests.sweep.twins import HIDDEN, Case, save_twin, token_ids


@dataclass(frozen=True)
class Comparison:
    """Of one case.

    Attributes:
        same: what was compared came out the same, to the last bit.
        said: why it could not be compared, or what differed.
    """

    name: str
    same: bool | None
    said: str = ""


class _Tokenizer:
    eos_token_id = None


def compare_streamed(case: Case, seed: int = 0) -> Comparison:
    """Hidden states, steered logits and completions, streamed and in memory."""
    with tempfile.TemporaryDirectory() as place:
        folder = save_twin(case, Path(place) / "twin", seed)
        try:
            subject = subject_at(Source(folder, None, None, None), inexact=True)
            models = [
                load_model(subject, RunOptions(memory=way, batch_size=2), dtype="float32", tokenizer=_Tokenizer())
                for way in ("resident", "streamed")
            ]
            found = [_numbers(model, case, seed) for model in models]
        except AbliterateError as error:
            return Comparison(case.name, None, str(error)[:300])
    assert isinstance(models[1].runner, Streamed)
    if models[0].stream.names != models[1].stream.names:
        return Comparison(case.name, False, "writers are reached elsewhere")
    wrong = [key for key in found[0] if not _equal(found[0][key], found[1][key])]
    return Comparison(case.name, not wrong, ", ".join(wrong))


def _numbers(model: LanguageModel, case: Case, seed: int) -> dict[str, Any]:
    tokens = token_ids(case, seed)
    if tokens.dim() > 2:
        raise AbliterateError("takes more than token ids")
    rows = tokens.tolist()
    prompts = [rows[0], rows[-1][:9], rows[0][:12], rows[-1], rows[0][3:10]]
    r = pico.unit(HIDDEN, seed)
    steers = [Steer(ablate=r), Steer(), Steer(add=3 * r, layer=1), Steer(ablate=r), Steer(add=r, layer=0)]
    found: dict[str, Any] = {}
    for name, given in (("plain", None), ("steered", steers)):
        for batch in model.forward(prompts, given, positions=2):
            found |= {f"{name} {row}": logits for row, logits in zip(batch.rows, batch.logits, strict=True)}
            assert batch.hidden is not None
            found |= {f"{name} {row} hidden": h for row, h in zip(batch.rows, batch.hidden, strict=True)}
    found["first order"] = first_order_bypass(model, prompts, [5, 9], torch.stack([r, pico.unit(HIDDEN, seed + 1)]))
    return found | {"completions": model.generate(prompts, 4)}


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    return bool(first == second)
