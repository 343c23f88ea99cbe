"""One picture with a question, as a checkpoint's own processor makes it into inputs of the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from abliterate.architecture.conversion import quiet_transformers
from abliterate.errors import CalibrationError, first_line

SIDE = 224
QUESTION = "What is in the picture?"


def picture(side: int = SIDE) -> Image.Image:
    """A picture with edges, gradients and noise, the same every time."""
    made = np.random.default_rng(0)
    down, across = np.mgrid[0:side, 0:side] / side
    channels = [across, down, (across > 0.5) ^ (down > 0.5)]
    values = np.stack(channels, axis=-1) * 200 + made.uniform(0, 55, (side, side, 3))
    return Image.fromarray(values.astype(np.uint8))


def picture_inputs(folder: Path, trust_remote_code: bool = False) -> Mapping[str, Tensor]:
    """Token ids with places for the picture, and its pixels, as the model's forward pass takes them.

    Raises:
        CalibrationError: the checkpoint has no processor that can be built and used here.
    """
    with quiet_transformers():
        try:
            processor = AutoProcessor.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
            if getattr(processor, "image_processor", None) is None:
                raise CalibrationError("it takes no pictures")
            inputs = processor(images=[picture()], text=[_question(processor)], return_tensors="pt")
        except Exception as error:  # what processors of hundreds of kinds raise has no common base
            raise CalibrationError(f"no usable image processor in {folder.name}: {first_line(error)}") from error
    return {key: value for key, value in dict(inputs).items() if isinstance(value, torch.Tensor)}


def _question(processor: Any) -> str:
    """The question with a place for the picture: the chat template's, where it has one, else by the image token."""
    token = str(getattr(processor, "image_token", None) or "<image>")
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        chat = str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        if token in chat:
            return chat
    return f"{token}\n{QUESTION}"
