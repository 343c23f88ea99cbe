"""Models that see: what brings pictures into the stream is edited, and proved on one."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, LlavaProcessor

import abliterate
from abliterate.calibration.pictures import picture
from abliterate.conversion import Conversion
from tests import pico
from tests.sweep import twins

PROJECTOR = "multi_modal_projector.linear_2.weight"


def seeing(folder: Path, processor: bool) -> Path:
    """A tiny LLaVA, with or without a processor."""
    tokenizer = copy.deepcopy(pico.make_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    case = twins.cases()["llava@image_text_to_text"]
    own: Mapping[str, Any] = {"image_token_index": image, "image_token_id": image}
    text = {**case.twin.get("text_config", {}), "vocab_size": len(tokenizer) + 3}
    twins.save_twin(dataclasses.replace(case, twin={**case.twin, **own, "text_config": text}), folder)
    if processor:
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        LlavaProcessor(
            CLIPImageProcessor(**sizes),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
        ).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
    return folder


def converted(folder: Path, tmp_path: Path) -> Conversion:
    direction = pico.direction_file(tmp_path / "r.safetensors")
    return abliterate.convert(str(folder), tmp_path / "out", direction=direction, evaluate=False, overwrite=True)


def test_the_certificate_covers_a_picture(tmp_path: Path) -> None:
    folder = seeing(tmp_path / "m", processor=True)
    made = converted(folder, tmp_path)
    assert made.holds and not any("picture" in said for said in made.manifest["warnings"])
    alone = converted(seeing(tmp_path / "blind", processor=False), tmp_path)
    # the picture's 16 patches, and the question around them
    assert made.certificate.stream.tokens > alone.certificate.stream.tokens + 16


def test_without_a_processor_only_the_text_part_is_claimed(tmp_path: Path) -> None:
    made = converted(seeing(tmp_path / "m", processor=False), tmp_path)
    assert made.holds
    assert any("no picture ran" in said and "text part" in said for said in made.manifest["warnings"])


def test_a_projector_that_still_writes_is_found_by_the_picture(tmp_path: Path) -> None:
    made = converted(seeing(tmp_path / "m", processor=True), tmp_path)
    shard = made.folder / "model.safetensors"
    tensors, before = load_file(shard), load_file(tmp_path / "m" / "model.safetensors")
    assert not torch.equal(tensors[PROJECTOR], before[PROJECTOR])
    tensors[PROJECTOR] = before[PROJECTOR]
    save_file(tensors, shard, metadata={"format": "pt"})
    found = abliterate.verify(str(made.folder))
    assert not found.certificate.holds and found.certificate.stream.worst > 1e-3
    # and text alone does not show it
    for name in ("preprocessor_config.json", "processor_config.json"):
        (made.folder / name).unlink(missing_ok=True)
    assert abliterate.verify(str(made.folder)).certificate.stream.worst < 1e-6


def test_the_picture_is_the_same_every_time() -> None:
    assert picture(32).tobytes() == picture(32).tobytes() and len(set(picture(32).tobytes())) > 100


@pytest.mark.parametrize("name", ["mllama", "qwen3_vl", "gemma3"])
def test_what_brings_pictures_in_is_edited(name: str, tmp_path: Path) -> None:
    wanted = {
        "mllama": "cross_attn.o_proj.weight",
        "qwen3_vl": "merger.linear_fc2.weight",
        "gemma3": "mm_input_projection_weight",
    }[name]
    made = converted(twins.save_twin(twins.cases()[f"{name}@image_text_to_text"], tmp_path / "m"), tmp_path)
    assert made.holds
    edited = {writer.tensor for writer in made.certificate.writers}
    assert any(tensor.endswith(wanted) for tensor in edited), sorted(edited)
