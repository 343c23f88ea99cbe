"""From a checkpoint to a model whose decoder layers are streamed through memory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from abliterate.architecture.blueprint import read_blueprint
from abliterate.architecture.conversion import usable
from abliterate.architecture.writer import Plan
from abliterate.calibration.load import Changes, from_pretrained, head_of, prompts_a_pass
from abliterate.calibration.memory import SPOOL_BYTES, Placement
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.runner import Resident, Runner, Streamed
from abliterate.calibration.spool import Spool
from abliterate.calibration.store import LayerStore
from abliterate.calibration.tour import find_stream
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.read import read_tensor
from abliterate.errors import AbliterateError, CheckpointError, first_line

log = logging.getLogger(__name__)


def load_streamed(
    checkpoint: Checkpoint,
    plan: Plan,
    placement: Placement,
    *,
    device: torch.device,
    dtype: torch.dtype,
    scratch: Path,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    tied_head: bool = False,
    tokenizer: Any = None,
    changes: Changes | None = None,
) -> LanguageModel:
    """A model that gives the same numbers, bit by bit, as one in memory.

    Args:
        scratch: folder on a disk with room for the embedding, the head, and activations that outgrow memory.
        changes: made to the weights whenever they are loaded.

    Raises:
        CheckpointError: weights are missing, or of the wrong shape.
    """
    if checkpoint.keeper is not None and not usable():
        raise CheckpointError(
            "this version of transformers loads layers from whole checkpoints alone: leave out --cache-limit, or "
            "install another version"
        )
    if changes and not usable():
        raise CheckpointError(
            "this version of transformers streams weights as they are stored alone, and these are to be changed: give "
            "--memory resident, or install another version"
        )
    how = _How(checkpoint, plan, placement, device, dtype, scratch, trust_remote_code, changes or {})
    model, runner = _by_layer(how) if usable() else _by_accelerate(how)

    def read(name: str) -> torch.Tensor:
        return read_tensor(checkpoint.shard_of(name), checkpoint.tensors[name]).to(dtype)

    stream = find_stream(model, plan, tied_head, read, runner)
    return LanguageModel(model, tokenizer, stream, head_of(model, plan), batch_size or prompts_a_pass(device), runner)


@dataclass(frozen=True)
class _How:
    """What is loaded, and how; see `load_streamed`."""

    checkpoint: Checkpoint
    plan: Plan
    placement: Placement
    device: torch.device
    dtype: torch.dtype
    scratch: Path
    trust_remote_code: bool
    changes: Changes


def _by_layer(how: _How) -> tuple[Any, Runner]:
    """All prompts go through a layer together while it is in memory."""
    try:
        store = LayerStore(
            how.checkpoint,
            how.plan.runtime.layers,
            dtype=how.dtype,
            device=how.device,
            scratch=how.scratch,
            held=how.placement.held,
            ahead=how.placement.ahead,
            trust_remote_code=how.trust_remote_code,
            changes=how.changes,
        )
    except AbliterateError:
        raise
    except Exception as error:  # damaged weights and configs raise errors of many kinds, some of them plain ones
        raise CheckpointError(f"{how.checkpoint.folder} cannot be streamed: {first_line(error)}") from error
    return store.model, Streamed(store, Spool(how.scratch, SPOOL_BYTES))


def _by_accelerate(how: _How) -> tuple[Any, Runner]:
    """Public interfaces alone: accelerate brings each layer's weights in again for every batch."""
    folder, trust = how.checkpoint.folder, how.trust_remote_code
    model = read_blueprint(folder, how.checkpoint.config, trust).model
    devices = _device_map(model, how.plan.runtime.layers[how.placement.held :], how.device)
    settings = {"device_map": devices, "offload_folder": str(how.scratch)}
    return from_pretrained(folder, how.plan, how.dtype, trust, **settings), Resident()


def _device_map(model: nn.Module, layers: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Layers on the disk, and everything else, in as few modules as will do, on the device."""
    devices: dict[str, Any] = dict.fromkeys(layers, "disk")
    above = {name.rsplit(".", depth)[0] for name in layers for depth in range(1, name.count(".") + 1)} | {""}
    for name, _ in model.named_modules():
        if name and name not in above and name.rpartition(".")[0] in above and name not in devices:
            devices[name] = str(device)
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        if name.rpartition(".")[0] in above:
            devices[name] = str(device)
    return devices
