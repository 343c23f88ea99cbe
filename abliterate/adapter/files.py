"""The two files of a LoRA adapter as PEFT and vLLM read them."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.adapter.factors import Factors
from abliterate.adapter.places import Target
from abliterate.direction.files import saved

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EXPERT_NAMES = frozenset(("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"))
"""Modules that PEFT, in a model with experts, takes for experts of an older transformers, whatever comes before the
name; a shared expert or a dense layer has to be targeted by its parameter."""


def adapter_tensors(target: Target, factors: Sequence[Factors], rank: int) -> dict[str, Tensor]:
    """The tensors of one module, by the names that PEFT gives them, fp32.

    Args:
        factors: of each of the target's writers.
        rank: of all modules; what has less is filled up with zeros.
    """
    name, b = f"{PREFIX}{target.module}", _wide(factors[0].b, 1, rank)
    if target.kind == "embedding":
        return {f"{name}.lora_embedding_A": _wide(factors[0].a, 0, rank), f"{name}.lora_embedding_B": b}
    if target.kind == "linear":
        return {f"{name}.lora_A.weight": _wide(factors[0].a, 0, rank), f"{name}.lora_B.weight": b}
    a = torch.cat([each.a if each.a.dim() == 3 else each.a[None] for each in factors])
    module = f"{PREFIX}{target.module.rpartition('.')[0]}"
    # PEFT reads A as [experts, rank, n], B as [hidden, rank, experts]
    return {
        f"{module}.lora_A.weight": _wide(a, 1, rank).flatten(0, 1),
        f"{module}.lora_B.weight": b[:, :, None].expand(-1, -1, len(a)).reshape(len(b), -1).contiguous(),
    }


@dataclass(frozen=True)
class Stored:
    """The factors of one module as they are in the file.

    Attributes:
        a: [rank, n] fp32, or [experts, rank, n]. `b`: [hidden, rank] fp32, or [hidden, rank, experts].
    """

    a: Tensor
    b: Tensor

    def of(self, expert: int) -> "Stored":
        """Of one of the experts."""
        return Stored(self.a[expert], self.b[:, :, expert])


def read_factors(tensors: Mapping[str, Tensor], target: Target, rank: int) -> Stored:
    """The other way round than `adapter_tensors`."""
    name = f"{PREFIX}{target.module}"
    if target.kind == "embedding":
        return Stored(tensors[f"{name}.lora_embedding_A"], tensors[f"{name}.lora_embedding_B"])
    if target.kind == "linear":
        return Stored(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
    module = f"{PREFIX}{target.module.rpartition('.')[0]}"
    a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    return Stored(a.reshape(-1, rank, a.shape[1]), b.reshape(len(b), rank, -1))


def bias_name(module: str, wrapped: Collection[str]) -> str:
    """What PEFT calls a bias; inside of a module that has LoRA factors it is the wrapped layer's."""
    return f"{PREFIX}{module}{'.base_layer' if module in wrapped else ''}.bias"


def adapter_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """`adapter_model.safetensors`."""
    return saved(tensors, {"format": "pt"})


def adapter_config(
    base: str, revision: str | None, targets: Sequence[Target], rank: int, modules: Collection[str]
) -> bytes:
    """`adapter_config.json`.

    Args:
        base: Hub id, or name of a folder.
        modules: names of all modules of the model.
    """
    parameters = [target.module for target in targets if target.kind == "experts"]
    adapted = [target.module for target in targets if target.kind in ("linear", "embedding")]
    if parameters:
        taken = [name for name in adapted if name.rpartition(".")[2] in EXPERT_NAMES]
        parameters += [f"{name}.weight" for name in taken]
        adapted = [name for name in adapted if name not in taken]
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "all" if any(target.kind == "bias" for target in targets) else "none",
        "fan_in_fan_out": any(target.kind == "linear" and target.writers[0].axis == 1 for target in targets),
        "target_modules": short_names(adapted, modules),
        "target_parameters": parameters or None,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def short_names(adapted: Sequence[str], modules: Collection[str]) -> list[str]:
    """Last parts of names where these stand for the adapted modules and no others, else whole names."""
    wanted = set(adapted)
    alike: dict[str, set[str]] = {}
    for name in modules:
        alike.setdefault(name.rpartition(".")[2], set()).add(name)
    return sorted({name.rpartition(".")[2] if alike[name.rpartition(".")[2]] <= wanted else name for name in adapted})


def _wide(factor: Tensor, axis: int, rank: int) -> Tensor:
    """The factor with zeros up to the rank along an axis."""
    missing = rank - factor.shape[axis]
    if missing == 0:
        return factor
    shape = list(factor.shape)
    shape[axis] = missing
    return torch.cat((factor, factor.new_zeros(shape)), dim=axis)
