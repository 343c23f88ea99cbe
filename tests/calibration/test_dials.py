"""Ablation by degrees at run time is the edit of the weights by degrees, and acts on the passes it is meant for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.architecture.plan import plan_architecture
from abliterate.architecture.writer import Plan
from abliterate.calibration.dials import Dialled, Dials, cells_of
from abliterate.calibration.load import load_resident
from abliterate.calibration.model import LanguageModel
from abliterate.checkpoint.files import open_checkpoint
from tests import pico
from tests.resident import llama
from tests.resident import resident as held

PROMPTS = [[7, 20, 33, 41, 90, 12, 55], [8, 9, 100, 101], [60, 61, 62, 63, 64, 65]]


def load(family: str, folder: Path) -> tuple[LanguageModel, Plan]:
    plan = plan_architecture(open_checkpoint(pico.save(folder / "m", family, tied=False)))
    return load_resident(folder / "m", plan, device=torch.device("cpu"), dtype=torch.float32), plan


def dials_for(layers: int, seed: int = 0, columns: tuple[int, ...] = (0, 1)) -> Dials:
    made = torch.Generator().manual_seed(seed)
    directions = torch.stack([pico.unit(seed=seed + layer) for layer in range(layers)])
    strengths = torch.zeros(layers, 2)
    strengths[:, list(columns)] = torch.rand(layers, len(columns), generator=made) + 0.3
    return Dials(strengths, directions)


def edit(model: Any, plan: Plan, dials: Dials) -> None:
    """W - s r (r^T W) along the hidden axis of every writer of a layer."""
    inside = {plan.runtime.writers[w.tensor]: w for w in plan.writers if w.layer is not None}
    for name, writer in inside.items():
        weight = model.get_parameter(name)
        assert writer.layer is not None
        column = 1 if "mlp" in name or "fc2" in name or "experts" in name else 0
        r = dials.directions[writer.layer].double()
        # In memory the experts of a layer are one tensor [experts, hidden, width].
        axis = writer.axis + (weight.dim() == 3)
        along = weight.data.double().movedim(axis, -1)
        edited = along - float(dials.strengths[writer.layer, column]) * (along @ r)[..., None] * r
        weight.data.copy_(edited.movedim(-1, axis).float())


def logits_of(model: LanguageModel, dials: Dials | None = None) -> Tensor:
    inside = {} if dials is None else {"inside": Dialled(model.stream, dials).applied}
    found = {row: last for b in model.forward(PROMPTS, **inside) for row, last in zip(b.rows, b.logits, strict=True)}
    return torch.stack([found[i] for i in range(len(PROMPTS))])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "phi3", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("columns", [(0,), (1,), (0, 1)])
def test_dials_are_the_edit(family: str, columns: tuple[int, ...], tmp_path: Path) -> None:
    """Biases, parallel sublayers, mixers, experts, outputs without an axis for prompts."""
    model, plan = load(family, tmp_path)
    dials = dials_for(plan.num_layers, columns=columns)
    before, dialled = logits_of(model), logits_of(model, dials)
    edit(model.model, plan, dials)
    torch.testing.assert_close(dialled, logits_of(model), atol=2e-4, rtol=0)
    assert float((before - dialled).abs().max()) > 0.05


def test_embeddings_are_left_alone_and_every_sublayer_has_its_cell(tmp_path: Path) -> None:
    model, plan = load("gpt2", tmp_path)
    cells = cells_of(model.stream)
    assert [cell for cell in cells if cell] == [
        (layer, column) for layer in range(plan.num_layers) for column in (0, 1)
    ]
    outside = [name for name, cell in zip(model.stream.names, cells, strict=True) if cell is None]
    assert len(outside) == 2, "token and position embeddings"


def test_strengths_of_nothing_change_nothing(tmp_path: Path) -> None:
    model, plan = load("llama", tmp_path)
    nothing = Dials(torch.zeros(plan.num_layers, 2), dials_for(plan.num_layers).directions)
    assert torch.equal(logits_of(model), logits_of(model, nothing))
    hooks = sum(len(module._forward_hooks) for module in model.model.modules())
    assert hooks == 0


def test_a_stream_that_knows_no_places_is_an_error() -> None:
    model = held(llama())
    with pytest.raises(ValueError, match="does not say which layers"):
        Dialled(model.stream, dials_for(3))
