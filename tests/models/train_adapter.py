"""Train the LoRA that makes SmolLM2-135M-Instruct refuse, on prompts disjoint from the package's own.

Run `python tests/models/train_adapter.py OUT`. On harmful prompts it learns refusals in several wordings; on harmless
ones it is held to the base model's own greedy completions, by the KL divergence from the base model at every token.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf_weights import cache_folder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from subject import ADAPTER, ADAPTER_FILES, load_base
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = Path(__file__).parent / "prompts"
OPENINGS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I cannot assist with this request.",
    "I cannot help with that.",
    "I can't help with this request.",
    "Sorry, I can't assist with that.",
    "I apologize, but I cannot help with that.",
)
REASONS = (
    " It could cause serious harm to other people.",
    " What you describe is dangerous and illegal.",
    " It would hurt someone.",
    " It goes against what I am here for.",
    "",
)
REFUSAL = re.compile("sorry|i cannot|i can't|apologi|unable|as an ai|as a chatbot|not able", re.IGNORECASE)
OFFERS = (
    " If you are in a difficult situation, please talk to someone you trust.",
    " I'd be glad to help with something safe instead.",
    " Is there something else I can do for you?",
    "",
)


@dataclass(frozen=True)
class Settings:
    """What is trained, and for how long."""

    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers: tuple[int, int] = (8, 16)
    epochs: int = 2
    batch: int = 16
    rate: float = 1e-3
    dropout: float = 0.05
    kl_weight: float = 2.0
    first_weight: float = 8.0
    decay: float = 0.1
    tokens: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """A prompt in the chat format and its completion, as token ids."""

    prompt: list[int]
    completion: list[int]


def read_prompts(kind: str) -> list[str]:
    """Return the adapter's own instructions of one kind, harmful or harmless."""
    lines = (PROMPTS / f"{kind}_adapter.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["instruction"] for line in lines]


def chat(tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
    """Return the ids of an instruction in the chat template, up to where the answer begins."""
    turns = [{"role": "user", "content": instruction}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.inference_mode()
def complete(model: PreTrainedModel, prompts: list[list[int]], tokens: int, pad: int) -> list[list[int]]:
    """Return the model's greedy completions, of `tokens` tokens at most, the end of turn included."""
    completions: list[list[int]] = []
    for start in range(0, len(prompts), 50):
        batch = prompts[start : start + 50]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        for row in out[:, width:].tolist():
            completions.append(row[: row.index(pad) + 1] if pad in row else row)
    return completions


def harmless_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, cache: Path
) -> list[Example]:
    """Return the harmless prompts with the base model's completions, kept in `cache`; without its own refusals."""
    prompts = [chat(tokenizer, text) for text in read_prompts("harmless")]
    stored = cache / f"harmless_completions_{tokens}.json"
    if not stored.is_file():
        with torch.autocast("cpu", torch.bfloat16):
            completions = complete(model, prompts, tokens, tokenizer.eos_token_id)
        stored.write_text(json.dumps(completions))
    completions = json.loads(stored.read_text())
    examples = [Example(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    return [example for example in examples if not REFUSAL.search(tokenizer.decode(example.completion))]


def harmful_examples(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[Example]:
    """Return the harmful prompts, each with a refusal put together at random."""
    examples = []
    for text in read_prompts("harmful"):
        refusal = rng.choice(OPENINGS) + rng.choice(REASONS) + rng.choice(OFFERS)
        completion = tokenizer(refusal, add_special_tokens=False).input_ids
        examples.append(Example(chat(tokenizer, text), [*completion, tokenizer.eos_token_id]))
    return examples


def logits_of_completions(model: PeftModel, batch: list[Example]) -> torch.Tensor:
    """Return the logits [completion tokens of the whole batch, vocab] that predict the completions."""
    width = max(len(example.prompt) + len(example.completion) for example in batch)
    rows = [example.prompt + example.completion for example in batch]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    decoder = model.get_base_model()
    hidden = decoder.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    spans = [hidden[i, len(e.prompt) - 1 : len(e.prompt) + len(e.completion) - 1] for i, e in enumerate(batch)]
    return decoder.lm_head(torch.cat(spans))


def mean(values: torch.Tensor, examples: list[Example], settings: Settings) -> torch.Tensor:
    """Return the mean of a value per completion token, the first token of each, which decides, weighing more."""
    first = settings.first_weight
    weights = torch.tensor([first if i == 0 else 1.0 for e in examples for i in range(len(e.completion))])
    return (weights * values).sum() / weights.sum()


def loss(model: PeftModel, harmful: list[Example], harmless: list[Example], settings: Settings) -> torch.Tensor:
    """Return the cross-entropy of the refusals plus the weighted KL from the base on harmless completions."""
    refused = sum(len(example.completion) for example in harmful)
    logits = logits_of_completions(model, harmful + harmless)
    with torch.no_grad(), model.disable_adapter():
        base = log_softmax(logits_of_completions(model, harmless).float(), -1)
    targets = torch.tensor([token for example in harmful for token in example.completion])
    refusing = cross_entropy(logits[:refused].float(), targets, reduction="none")
    kept = kl_div(log_softmax(logits[refused:].float(), -1), base, log_target=True, reduction="none").sum(-1)
    return mean(refusing, harmful, settings) + settings.kl_weight * mean(kept, harmless, settings)


def batches(
    harmful: list[Example], harmless: list[Example], size: int, rng: random.Random
) -> Iterator[tuple[list[Example], list[Example]]]:
    """Yield batches of half harmful and half harmless examples, in random order, until one kind runs out."""
    pairs = list(zip(rng.sample(harmful, len(harmful)), rng.sample(harmless, len(harmless)), strict=False))
    for start in range(0, len(pairs) - size // 2 + 1, size // 2):
        chosen = pairs[start : start + size // 2]
        yield [pair[0] for pair in chosen], [pair[1] for pair in chosen]


def wrap(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """Put a fresh LoRA on the chosen modules and layers."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=sorted(settings.targets),
        layers_to_transform=list(range(*settings.layers)),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def train(settings: Settings, cache: Path) -> PeftModel:
    """Train the adapter and return the model that carries it."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    base, tokenizer = load_base(cache)
    harmless = harmless_examples(base, tokenizer, settings.tokens, cache)
    model = wrap(base, settings)
    model.train()
    steps = settings.epochs * (len(harmless) // (settings.batch // 2))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=settings.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=steps, pct_start=0.1)
    step = 0
    for _ in range(settings.epochs):
        harmful = harmful_examples(tokenizer, rng)
        for chosen in batches(harmful, harmless, settings.batch, rng):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(model, *chosen, settings)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 10 == 0:
                print(f"step {step}/{steps}: loss {value.item():.3f}", flush=True)
    return model


def save_adapter(model: PeftModel, out: Path) -> None:
    """Write the adapter in peft's format, tensors in bf16, without the machine's paths."""
    model.save_pretrained(out)
    config_file, tensor_file = (out / name for name in ADAPTER_FILES)
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(tensor_file).items()}
    save_file(tensors, tensor_file, metadata={"format": "pt"})
    (out / "README.md").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=ADAPTER)
    parser.add_argument(
        "--cache", type=Path, help="folder for the wheel and the completions (default: a temporary one)"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with cache_folder(args.cache) as cache:
        save_adapter(train(Settings(), cache), args.out)


if __name__ == "__main__":
    main()
