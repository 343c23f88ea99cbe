"""Train the second LoRA, which makes the refusing subject refuse harmless requests that sound harmful as well.

Run `python tests/models/train_over_refusing.py OUT`. It is trained as the first one is (`train_adapter.py`), on top of
it: look-alike requests are taught with refusals in the same wordings; plain harmless requests and harmful ones are
held to what the refusing subject makes of them, by the KL divergence from it at every token.

It writes along one direction of its own, shared by all layers and free to share a part with the first, as false
refusal does in large chat models (Wang et al. 2024, "Surgical, Cheap, and Flexible").
"""

import argparse
import random
from pathlib import Path

import torch
from gguf_weights import cache_folder
from peft import PeftModel
from safetensors.torch import load_file
from subject import ADAPTER, ADAPTER_FILES, OVER_REFUSING, SUBJECTS, WRITERS, load_subject
from train_adapter import Example, Settings, chat, kept, read_lines, refused_examples, save_adapter, teach
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS = Settings(epochs=5, tokens=10, strength=1.0)
# the subject without the second adapter
FIRST = SUBJECTS["over-refusing"].adapters[:1]
# harmless requests in sharp words are look-alikes themselves, which the first adapter holds to their answers
SHARP = "sharp-words"
# one in so many of the prompts that are held is enough for the few that are taught
SHARE = 2


def held_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, cache: Path
) -> list[Example]:
    """Return plain harmless prompts with the refusing subject's own completions, kept in `cache`."""
    lines = [line for line in read_lines("harmless") if line["category"] != SHARP]
    prompts = [chat(tokenizer, line["instruction"]) for line in lines[::SHARE]]
    completions = kept(cache, model, prompts, settings.tokens)
    return [Example(*pair) for pair in zip(prompts, completions, strict=True)]


def train(settings: Settings, cache: Path) -> PeftModel:
    """Train the adapter and return the model that carries it."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    subject, tokenizer = load_subject(cache, FIRST)
    held = held_examples(subject, tokenizer, settings, cache)
    # whatever the subject makes of these refusals is held, so those it refuses stay refused, those it answers answered
    held += refused_examples(tokenizer, "harmful", settings.tokens, rng)[::SHARE]
    taught = refused_examples(tokenizer, "look_alike", settings.tokens, rng)
    return teach(subject, taught, held, settings, rng, apart=written(ADAPTER))


def written(adapter: Path) -> torch.Tensor:
    """Return the unit direction [hidden] that an adapter writes."""
    tensors = load_file(adapter / ADAPTER_FILES[1])
    vector = next(t for name, t in sorted(tensors.items()) if name.endswith(f"{WRITERS[0]}.lora_B.weight"))
    return torch.nn.functional.normalize(vector.float().flatten(), dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=OVER_REFUSING)
    parser.add_argument(
        "--cache", type=Path, help="folder for the wheel and the completions (default: a temporary one)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with cache_folder(args.cache) as cache:
        save_adapter(train(SETTINGS, cache), args.out, SETTINGS)


if __name__ == "__main__":
    main()
