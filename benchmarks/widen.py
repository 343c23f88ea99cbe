"""A checkpoint of any size that behaves as a small one: `python benchmarks/widen.py BASE FOLDER --gigabytes 2`.

The MLPs of a Llama get more channels, whose gates are 0: what the model says stays the same, and every layer grows. So
a calibration can be measured that finds something, on weights as large as one wants.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 500_000_000


def widened(base: Path, times: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, MLPs `times` as wide; the new channels' own weights are those of the first ones again."""
    with safe_open(base / "model.safetensors", framework="pt") as stored:
        for name in sorted(stored.keys()):
            tensor = stored.get_tensor(name)
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                more = [tensor * (0 if "gate" in name else 1)] * (times - 1)
                tensor = torch.cat([tensor, *more])
            elif name.endswith("down_proj.weight"):
                tensor = torch.cat([tensor] * times, dim=1)
            yield name, tensor.contiguous()


def make(base: Path, folder: Path, size: int) -> int:
    """Writes the checkpoint; returns its bytes."""
    config = json.loads((base / "config.json").read_text())
    with safe_open(base / "model.safetensors", framework="pt") as stored:
        sizes = {name: stored.get_tensor(name).nbytes for name in stored.keys()}  # noqa: SIM118
    mlps = sum(value for name, value in sizes.items() if ".mlp." in name)
    times = max(1, round((size - sum(sizes.values())) / mlps) + 1)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", ".*"))
    config["intermediate_size"] *= times
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards: list[dict[str, Tensor]] = [{}]
    placed: dict[str, int] = {}
    total = 0
    for name, tensor in widened(base, times):
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors", {"format": "pt"})
            shards[-1] = {}
            shards.append({})
        shards[-1][name] = tensor
        placed[name] = len(shards)
        total += tensor.nbytes
    save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors", {"format": "pt"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": {n: f"model-{i:05}.safetensors" for n, i in placed.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    arguments = parser.parse_args()
    print(make(arguments.base, arguments.folder, int(arguments.gigabytes * 1e9)))
