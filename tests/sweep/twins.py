"""The cases of the sweep: a tiny twin of every language model that transformers has, see `cases.yaml`."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from abliterate.architecture.shrink import HIDDEN, SPECIAL
from abliterate.architecture.twin import build_twin, twin_config

__all__ = ["HIDDEN", "Case", "build", "cases", "class_of", "config_of", "save_twin", "skipped", "token_ids"]

_FILE = Path(__file__).with_name("cases.yaml")
_LENGTH = 16
_MIXERS = ("fn", "base", "scale")


@dataclass(frozen=True)
class Case:
    """One model of the sweep.

    Attributes:
        name: a model type, `type:variant`, or `type@image_text_to_text` for the class that sees images.
        ci: whether it is of the representative subset.
        text: whether its forward takes token ids and nothing else.
        config: settings of the model, beside the defaults of its type.
        twin: settings of its twin, where others than `shrink` chooses are needed.
        refused: a phrase of the reason for which it is not converted; None where it is.
        pulled_back: whether its skip path has gains, so that the direction turns from layer to layer.
        hooks: whether hooks on modules reach all that writes to the stream.
    """

    name: str
    ci: bool = False
    text: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    twin: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None
    pulled_back: bool = False
    hooks: bool = True

    @property
    def model_type(self) -> str:
        return self.name.partition("@")[0].partition(":")[0]

    @property
    def kind(self) -> str:
        return "image_text_to_text" if "@" in self.name else "causal"


@functools.cache
def cases() -> Mapping[str, Case]:
    """All cases by name, sorted."""
    listed = yaml.safe_load(_FILE.read_text(encoding="utf-8"))["cases"]
    return {name: Case(name, **(said or {})) for name, said in listed.items()}


def skipped() -> Mapping[str, str]:
    """What is left out, and why."""
    said: Mapping[str, str] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))["skipped"]
    return said


def class_of(case: Case) -> type[PreTrainedModel]:
    """The class that transformers' auto classes take for a case."""
    causal = case.kind == "causal"
    chosen = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" if causal else "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
    made: type[PreTrainedModel] = getattr(transformers, getattr(modeling_auto, chosen)[case.model_type])
    return made


def config_of(case: Case) -> PreTrainedConfig:
    """The config of the twin."""
    return twin_config(CONFIG_MAPPING[case.model_type](**case.config), case.twin)


def build(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The twin."""
    return build_twin(config_of(case), class_of(case), seed, dtype)


def save_twin(case: Case, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Saves the twin as transformers does, without a tokenizer, and returns the folder."""
    build(case, seed, dtype).save_pretrained(folder)
    if case.model_type == "deepseek_v4":
        _as_released(folder / "model.safetensors")
    return folder


def _as_released(file: Path) -> None:
    """DeepSeek-V4's own names: transformers 5.24 saves `model.norm.weight`, which it then takes for another norm."""
    names = {"embed_tokens.weight": "embed.weight", **{f"hc_head.hc_{end}": f"hc_head_{end}" for end in _MIXERS}}
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file({names.get(name, name): tensor for name, tensor in bare.items()}, file, {"format": "pt"})


def token_ids(case: Case, seed: int = 0) -> Tensor:
    """Random tokens [batch, sequence] without a special one."""
    # Musicgen takes one row a codebook, and there are 4.
    made = torch.Generator().manual_seed(seed)
    return torch.randint(6, SPECIAL - 10, (4, _LENGTH), generator=made)
