"""Pico checkpoints, written by the safetensors library, and files forged by hand."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "tie_word_embeddings": True}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of many shapes and dtypes; names and dtypes are mixed so that data order is not name order."""
    made = torch.Generator().manual_seed(seed)

    def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=made).to(dtype)

    return {
        "model.embed.weight": weight(11, 8, dtype=torch.bfloat16),
        "model.0.out.weight": weight(8, 6),
        "model.0.in.weight": weight(6, 8, dtype=torch.float16),
        "model.0.out.bias": weight(8),
        "model.0.experts": weight(3, 8, 5, dtype=torch.float64),
        "model.0.mask": torch.ones(3, 3, dtype=torch.bool),
        "model.0.steps": torch.arange(5),
        "model.0.eighth": weight(4, 3).to(torch.float8_e4m3fn),
        "model.scale": torch.tensor(2.0),
        "model.empty": torch.empty(0, 4),
    }


def write(folder: Path, shards: int = 1, config: Mapping[str, Any] = CONFIG, seed: int = 0) -> Path:
    """A checkpoint folder; with `shards` above 1 also an index, as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    made = tensors(seed)
    if shards == 1:
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    placed = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(made.items())[number::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def forge(path: Path, entries: object, data: bytes = b"") -> Path:
    """A safetensors file with any header at all."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: Sequence[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Scaled:
    """Halves every element; measures as often as told, and remembers what it was shown."""

    def __init__(self, passes: int = 0) -> None:
        self.passes = passes
        self.independent, self.block_bytes = False, 8 << 20
        self.measured: list[tuple[slice, Tensor]] = []
        self.applied: list[slice] = []

    def measure(self, rows: slice, block: Tensor) -> None:
        self.measured.append((rows, block.clone()))

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        self.applied.append(rows)
        return (block.double() / 2).to(block.dtype)

    def late(self) -> Iterator[tuple[int, Tensor]]:
        yield from ()
