"""Edits of pico checkpoints as people make them, with other code than this project's."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[str, Tensor], Tensor]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WRITERS = ("o_proj.weight", "down_proj.weight")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of any number of shards."""
    shards = [load_file(path) for path in sorted(folder.glob("model*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def changed(base: Path, out: Path, change: Change, dtype: torch.dtype | None = None) -> Path:
    """A copy in one file, every tensor through `change` in fp32 and stored as before, or as `dtype`."""
    found = {}
    for name, tensor in tensors_of(base).items():
        edited = change(name, tensor.float())
        found[name] = edited.to(dtype or tensor.dtype).contiguous()
    return written(base, out, found)


def written(base: Path, out: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A checkpoint of these tensors, everything else as in the base."""
    ignore = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(base, out, ignore=ignore)
    save_file(dict(tensors), out / "model.safetensors", {"format": "pt"})
    return out


def configured(folder: Path, **values: object) -> Path:
    """Sets keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def projected(r: Tensor, strength: float = 1.0, names: tuple[str, ...] = (*WRITERS, "embed_tokens.weight")) -> Change:
    """W - s r (r.W), in float32 and rounded to the nearest, as most tools do."""

    def change(name: str, weight: Tensor) -> Tensor:
        if not name.endswith(names):
            return weight
        if "embed_tokens" in name:
            return weight - strength * torch.outer(weight @ r, r)
        return weight - strength * torch.outer(r, r @ weight)

    return change


def norm_kept(r: Tensor) -> Change:
    """Columns of o_proj and down_proj keep their length."""

    def change(name: str, weight: Tensor) -> Tensor:
        edited = projected(r, names=WRITERS)(name, weight)
        return edited * (weight.norm(dim=0) / edited.norm(dim=0)) if name.endswith(WRITERS) else weight

    return change


def heretic(directions: Callable[[int], Tensor], weight_of: Callable[[int, str], float], rows: bool) -> Change:
    """Heretic's: a LoRA that projects, weighted by layer; with `rows` lengths of rows are kept, to rank 3."""

    def change(name: str, weight: Tensor) -> Tensor:
        if not name.endswith(WRITERS):
            return weight
        layer = int(name.split(".")[2])
        r, s = directions(layer), weight_of(layer, name)
        if not rows:
            return weight + (-s * r)[:, None] @ (r @ weight)[None]
        sizes = weight.norm(dim=1, keepdim=True)
        unit = weight / sizes
        moved = unit - s * torch.outer(r, r @ unit)
        moved = moved / moved.norm(dim=1, keepdim=True) * sizes
        left, values, right = torch.linalg.svd(moved - weight, full_matrices=False)
        return weight + (left[:, :3] * values[:3]) @ right[:3]

    return change


def lora(rank: int, seed: int = 1, scale: float = 0.05, modules: tuple[str, ...] = ("q_proj", "o_proj")) -> Change:
    """A trained one, merged: B A with nothing of the base in it."""
    made = torch.Generator().manual_seed(seed)

    def change(name: str, weight: Tensor) -> Tensor:
        if not any(f"{module}.weight" in name for module in modules):
            return weight
        b = torch.randn(weight.shape[0], rank, generator=made)
        a = torch.randn(rank, weight.shape[1], generator=made)
        return weight + scale * (b @ a) / rank**0.5

    return change


def tuned(scale: float = 0.02, seed: int = 2) -> Change:
    """A little noise everywhere: what the steps of training are, as far as a spectrum can tell."""
    made = torch.Generator().manual_seed(seed)
    return lambda name, weight: (
        weight + scale * weight.std().nan_to_num(1.0) * torch.randn(weight.shape, generator=made)
    )


def quantised(bits: int, group: int = 32) -> Change:
    """Matrices to a few bits in groups along rows, with a scale each, and back."""
    most = 2 ** (bits - 1) - 1

    def change(name: str, weight: Tensor) -> Tensor:
        if weight.dim() < 2 or weight.shape[1] % group:
            return weight
        groups = weight.reshape(-1, group)
        step = groups.abs().amax(1, keepdim=True).clamp_min(1e-9) / most
        return (groups / step).round().mul(step).reshape(weight.shape)

    return change
