"""Checkpoints of real shapes and any size, filled with noise: `python benchmarks/synthetic.py FOLDER --gigabytes 2`."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 32_000
SHARD_BYTES = 1_000_000_000
NOISE = 1 << 22
"""Elements drawn once and written again and again: a benchmark of files needs no better noise."""

Shapes = dict[str, tuple[int, ...]]


def layer_shapes(index: int) -> Shapes:
    """A decoder layer of a Llama of 1B parameters."""
    name, kv = f"model.layers.{index}.", HIDDEN * KV_HEADS // HEADS
    return {
        f"{name}input_layernorm.weight": (HIDDEN,),
        f"{name}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        f"{name}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{name}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{name}post_attention_layernorm.weight": (HIDDEN,),
        f"{name}self_attn.k_proj.weight": (kv, HIDDEN),
        f"{name}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{name}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{name}self_attn.v_proj.weight": (kv, HIDDEN),
    }


def model_shapes(target: int) -> tuple[Shapes, int]:
    """Tensors of about `target` bytes of bf16 in all, and how many layers that makes."""
    outer: Shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    last: Shapes = {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    each = nbytes(layer_shapes(0))
    layers = max(1, round((target - nbytes(outer | last)) / each))
    for index in range(layers):
        outer |= layer_shapes(index)
    return outer | last, layers


def nbytes(shapes: Shapes) -> int:
    """Size in bf16."""
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


def shards_of(shapes: Shapes) -> Iterator[Shapes]:
    """Tensors in shards of at most a gigabyte or so."""
    shard: Shapes = {}
    for name, shape in shapes.items():
        if shard and nbytes(shard) + nbytes({name: shape}) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


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
            file.write(noise[: end - start])


def make(folder: Path, target: int) -> int:
    """Makes the checkpoint; returns the size of its weights in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes, layers = model_shapes(target)
    values = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)) * 0.02
    noise = values.bfloat16().view(torch.uint8).numpy().tobytes()
    parts = list(shards_of(shapes))
    placed = {}
    for number, shard in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / name, shard, noise)
        placed |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": nbytes(shapes)}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2) + "\n")
    return nbytes(shapes)


def config(layers: int) -> dict[str, object]:
    """Of a Llama of these shapes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    args = parser.parse_args()
    print(f"{args.folder}: {make(args.folder, round(args.gigabytes * 1e9)) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
