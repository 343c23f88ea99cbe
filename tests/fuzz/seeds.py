"""Inputs to start from: well-formed files, one of each kind of thing that they can hold."""

import json
from collections.abc import Sequence

from safetensors.torch import save
from torch import Tensor, arange, empty, float8_e4m3fn, ones, tensor

MADE: dict[str, Tensor] = {
    "a.weight": ones(2, 3).bfloat16(),
    "b": arange(3),
    "c.é": empty(0, 4),
    "d": tensor(2.0),
    "e": ones(1, 1, 1).to(float8_e4m3fn),
}
CONFIG = {"model_type": "llama", "hidden_size": 8, "text_config": {"quantization_config": None}}
INDEX = {"metadata": {"total_size": 48}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
SEPARATOR = b"\xff\xfe--\n"
"""Between the files of a folder in one input."""


def seeds(target: str) -> Sequence[bytes]:
    """The corpus that a target starts from."""
    shard = save(MADE, {"format": "pt", "é": "\n"})
    index, config = json.dumps(INDEX).encode(), json.dumps(CONFIG).encode()
    deep, twice = b'{"a":' * 70 + b"1" + b"}" * 70, b'{"weight_map":{"x":"../a.safetensors","x":"A.safetensors"}}'
    known = {
        "header": [shard, save({}), save({"x": MADE["d"]}), b"version https://git-lfs"],
        "entries": [shard[8:], save({})[8:], b'{"a":{"dtype":"F16","shape":[-0,1],"data_offsets":[0,0]}}'],
        "index": [index, twice, deep],
        "checkpoint": [
            SEPARATOR.join((config, shard)),
            SEPARATOR.join((config, b"", index, save({"x": MADE["d"]}), save({"y": MADE["b"]}))),
            SEPARATOR.join((deep, shard)),
        ],
    }
    return known[target]
