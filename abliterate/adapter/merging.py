"""An adapter's files merged into weights as PEFT does it (`merge_and_unload`; W + scaling B A, Hu et al. 2021).

PEFT adds in the dtype that the weights are in: to a linear layer the difference in float32, rounded once; to an
embedding and to experts what the difference is when it is rounded as well.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from abliterate.adapter.files import Stored, bias_name, read_factors
from abliterate.adapter.places import Target
from abliterate.architecture.blueprint import Blueprint
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import DTYPES
from abliterate.checkpoint.read import Change


@dataclass(frozen=True)
class Merge:
    """What becomes of weights.

    Attributes:
        tensors: by name in the checkpoint, of its bytes. `parameters`: by name in the running model.
    """

    tensors: Mapping[str, Change]
    parameters: Mapping[str, Change]


def read_merge(
    config: bytes, weights: bytes, targets: Sequence[Target], checkpoint: Checkpoint, blueprint: Blueprint
) -> Merge:
    """The merge of an adapter that is on the disk.

    Args:
        config, weights: content of its two files.
        targets: what it was made for.
    """
    stored, settings = load_tensors(weights), json.loads(config)
    scaling = settings["lora_alpha"] / settings["r"]
    wrapped = {target.module for target in targets if target.kind != "bias"}
    tensors: dict[str, Change] = {}
    parameters: dict[str, Change] = {}
    for target in targets:
        dtype = DTYPES[checkpoint.tensors[target.writers[0].tensor].dtype]
        if target.kind == "bias":
            bias = stored[bias_name(target.module, wrapped)]
            tensors[target.writers[0].tensor] = parameters[f"{target.module}.bias"] = partial(_replaced, bias, dtype)
            continue
        factors = read_factors(stored, target, settings["r"])
        name = target.module if target.kind == "experts" else f"{target.module}.weight"
        once = target.kind == "linear" and name not in (settings["target_parameters"] or ())
        axis = _running_axis(target, blueprint)
        parameters[name] = partial(_merged, factors, scaling, axis, dtype, once)
        for number, writer in enumerate(target.writers):
            own = factors.of(number) if len(target.writers) > 1 else factors
            tensors[writer.tensor] = partial(_merged, own, scaling, writer.axis, dtype, once)
    return Merge(tensors, parameters)


def _running_axis(target: Target, blueprint: Blueprint) -> int:
    """The hidden axis of the parameter."""
    if target.kind == "experts":
        experts = blueprint.model.get_submodule(target.module.rpartition(".")[0])
        return 2 if getattr(experts, "is_transposed", False) else 1
    module = blueprint.model.get_submodule(target.module)
    return 1 if target.kind == "embedding" or isinstance(module, Conv1D) else 0


def _merged(
    factors: Stored, scaling: float, axis: int, dtype: torch.dtype, once: bool, rows: slice, block: Tensor
) -> Tensor:
    """Rows of W + scaling B A, in the stored dtype where the block is wider, else in the block's.

    Args:
        once: the sum alone is rounded.
    """
    wide = block.to(dtype if block.dtype == torch.float32 else block.dtype)
    added = difference(factors, axis, rows).to(block.device) * scaling
    return (wide + (added if once else added.to(wide.dtype))).to(wide.dtype).to(block.dtype)


def difference(factors: Stored, axis: int, rows: slice) -> Tensor:
    """B A, fp32, as it lies in a tensor whose hidden axis that is: rows of its axis 0."""
    a, b = factors.a, factors.b
    if a.dim() == 3:
        found = torch.einsum("hke,ekn->ehn", b[:, :, rows], a[rows])
        return found if axis == 1 else found.mT
    return b[rows] @ a if axis == 0 else (b @ a[:, rows]).T


def _replaced(bias: Tensor, dtype: torch.dtype, rows: slice, block: Tensor) -> Tensor:
    narrow = dtype if block.dtype == torch.float32 else block.dtype
    return bias[rows].to(narrow).to(block.device, block.dtype)
