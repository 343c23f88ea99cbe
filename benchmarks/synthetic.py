"""Checkpoints of real shapes and any size, filled with noise.

Run `python benchmarks/synthetic.py FOLDER --shape llama-3-8b --gigabytes 4`: tensors have the names and shapes of the
published model, config.json its settings, and only the number of decoder layers follows from the size.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from shapes import MODELS, Model, Shapes, nbytes

SHARD_BYTES = 1_500_000_000
NOISE = 1 << 24
"""Elements drawn once and written again and again: a benchmark of files needs no better noise."""


def shards_of(shapes: Shapes) -> Iterator[Shapes]:
    """Tensors in the order of the model in shards of at most SHARD_BYTES, each in the order of names as they are saved.

    A tensor that is larger has a shard of its own.
    """
    shard: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        added = nbytes({name: shape})
        if shard and size + added > SHARD_BYTES:
            yield dict(sorted(shard.items()))
            shard, size = {}, 0
        shard[name] = shape
        size += added
    yield dict(sorted(shard.items()))


def write_shard(path: Path, shapes: Shapes, noise: bytes) -> None:
    """One safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + nbytes({name: shape})
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(noise)):
            file.write(memoryview(noise)[: end - start])


def make(folder: Path, model: Model, target: int) -> int:
    """Makes the checkpoint, of about `target` bytes; returns the size of its weights in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = model.layers_in(target)
    shapes = model.shapes(layers)
    values = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)) * 0.02
    noise = values.bfloat16().view(torch.uint8).numpy().tobytes()
    parts = list(shards_of(shapes))
    placed: dict[str, str] = {}
    for number, shard in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / name, shard, noise)
        placed |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": nbytes(shapes)}, "weight_map": dict(sorted(placed.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(model.config_of(layers), indent=2) + "\n")
    return nbytes(shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(MODELS), default="llama-3-8b")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    args = parser.parse_args()
    size = make(args.folder, MODELS[args.shape](), round(args.gigabytes * 1e9))
    print(f"{args.folder}: {args.shape}, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
