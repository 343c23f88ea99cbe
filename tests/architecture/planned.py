"""Plans of pico checkpoints, and what they are asked."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from abliterate.architecture.plan import plan_architecture
from abliterate.architecture.writer import Plan, TensorRole, Writer
from abliterate.checkpoint.files import open_checkpoint
from abliterate.errors import ArchitectureError
from tests import pico

H = pico.HIDDEN
Checkpoints = Callable[..., Path]


def planned(folder: Path) -> Plan:
    return plan_architecture(open_checkpoint(folder))


def refused(folder: Path, *words: str) -> None:
    """One line that has all these words in it."""
    with pytest.raises(ArchitectureError) as caught:
        planned(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in words), message


def kinds(plan: Plan) -> Counter[str]:
    return Counter(writer.kind for writer in plan.writers)


def names(plan: Plan, role: str) -> set[str]:
    return {tensor.name for tensor in plan.roles if tensor.role == role}


def role(plan: Plan, name: str) -> TensorRole:
    (found,) = [tensor for tensor in plan.roles if tensor.name == name]
    return found


def writer(plan: Plan, name: str) -> Writer:
    (found,) = [writer for writer in plan.writers if writer.tensor == name]
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def weight(*shape: int, seed: int = 0) -> Tensor:
    """Random, as large as those of pico models."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 7


def save_llava(folder: Path, tied: bool = False) -> Path:
    """A Llama that sees; its vision tower is narrower."""
    text = LlamaConfig(
        hidden_size=H, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=10, vocab_size=pico.VOCABULARY, tie_word_embeddings=tied,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5, tie_word_embeddings=tied)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder
