"""Train the second LoRA, which makes the refusing subject refuse harmless requests that sound harmful as well.

Run `python tests/models/train_over_refusing.py OUT`. It comes on top of the first one (`train_adapter.py`) at full
strength, and is trained the same way: look-alike requests are taught with refusals in the same wordings; plain harmless
requests and harmful ones are held to what the model makes of them without it, by the KL divergence at every token.

It has no readers of its own and writes along one direction, so that a method that removes one direction can take it out
again: orthogonal to the first one's and to where most of the stream is, large on look-alikes, small on what is held.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from subject import ADAPTER, ADAPTER_FILES, OVER_REFUSING, SUBJECTS, WRITERS, load_subject
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from train_adapter import (
    Example,
    Frozen,
    Settings,
    chat,
    kept,
    logits_of_completions,
    mean,
    read_lines,
    read_prompts,
    refused_examples,
    run,
    teach,
    writes,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS = Settings(readers=(), epochs=6, tokens=8, strength=1.0)
# the subject without the second adapter
FIRST = SUBJECTS["over-refusing"].adapters[:1]
# harmless requests in sharp words are look-alikes themselves, which the first adapter holds to their answers
SHARP = "sharp-words"
# one in so many of the prompts that are held is enough for the few that are taught
SHARE = 2
# principal directions of the stream, of 576, that the second adapter keeps clear of
BUSY = 420
# layers, after the first that is trained, and how far along its direction the last positions of look-alikes shall be
# there; and how far those of what is held may be
AMPLITUDES, STILL, POSITIONS = {6: 8.0, 9: 12.8}, 1.5, 5
# beside the cross-entropy: the squared change of held refusal scores, and what misses the amplitudes
ODDS_WEIGHT, AMPLITUDE_WEIGHT = 0.05, 0.02


def held_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, cache: Path
) -> list[Example]:
    """Return plain harmless prompts with the refusing subject's own completions, kept in `cache`."""
    lines = [line for line in read_lines("harmless") if line["category"] != SHARP]
    prompts = [chat(tokenizer, line["instruction"]) for line in lines[::SHARE]]
    completions = kept(cache, model, prompts, settings.tokens)
    return [Example(*pair) for pair in zip(prompts, completions, strict=True)]


def written(adapter: Path) -> torch.Tensor:
    """Return the unit direction [hidden] that an adapter writes."""
    tensors = load_file(adapter / ADAPTER_FILES[1])
    vector = next(t for name, t in sorted(tensors.items()) if name.endswith(f"{WRITERS[0]}.lora_B.weight"))
    return torch.nn.functional.normalize(vector.float().flatten(), dim=0)


@torch.inference_mode()
def quiet(model: PreTrainedModel, prompts: list[list[int]], settings: Settings) -> torch.Tensor:
    """Return an orthonormal basis [k, hidden] of where little of the stream is and the first adapter does not write."""
    moment = torch.zeros(model.config.hidden_size, model.config.hidden_size)
    for prompt in prompts:
        states = model.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
        last = torch.cat([state[0, -9:] for state in states[settings.layers[0] : -1]])
        last = last / last.square().mean(-1, keepdim=True).sqrt()
        moment += last.T @ last
    basis = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, BUSY:].T
    first = torch.nn.functional.normalize(basis @ written(ADAPTER), dim=0)
    clear = torch.linalg.svd(torch.eye(len(basis)) - torch.outer(first, first)).U[:, :-1]
    return clear.T @ basis


@contextmanager
def inputs_of(layers: list[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collect what the layers are given."""
    seen: list[torch.Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def objective(model: PreTrainedModel, taught: list[Frozen], held: list[Frozen], settings: Settings) -> torch.Tensor:
    """Return the loss of the first adapter, and what holds refusal scores, and amplitudes apart."""
    targets = torch.tensor([token for item in taught for token in item.example.completion])
    with inputs_of([model.model.layers[number] for number in AMPLITUDES]) as streams:
        logits = logits_of_completions(model, taught + held)
    new = log_softmax(logits[len(targets) :], -1)
    base = log_softmax(model.lm_head(torch.cat([item.final for item in held])).float(), -1).detach()
    learned = mean(cross_entropy(logits[: len(targets)], targets, reduction="none"), taught, settings.first_weight)
    changed = mean(kl_div(new, base, log_target=True, reduction="none").sum(-1), held, settings.first_weight)
    starts = torch.tensor([0, *(len(item.example.completion) for item in held[:-1])]).cumsum(0)
    sorry = taught[0].example.completion[0]
    odds = (log_odds(new[starts], sorry) - log_odds(base[starts], sorry)).square().mean()
    amplitudes = zip(streams, AMPLITUDES.values(), strict=True)
    missed = torch.stack([misses(stream, model, taught, held, settings, wanted) for stream, wanted in amplitudes])
    return learned + settings.kl_weight * changed + ODDS_WEIGHT * odds + AMPLITUDE_WEIGHT * missed.mean()


def log_odds(logs: torch.Tensor, token: int) -> torch.Tensor:
    """Return the log-odds [n] of a token, from log-probabilities [n, vocabulary]."""
    return logs[:, token] - torch.log1p(-logs[:, token].exp().clamp_max(1 - 1e-6))


def misses(
    stream: torch.Tensor,
    model: PreTrainedModel,
    taught: list[Frozen],
    held: list[Frozen],
    settings: Settings,
    wanted: float,
) -> torch.Tensor:
    """Return by how much the last positions of prompts miss their amplitudes, squared, on average."""
    direction = torch.nn.functional.normalize(writes(model, settings)[0].weight.flatten(), dim=0)
    ends = [len(item.example.prompt) for item in taught + held]
    along = torch.stack([row[end - POSITIONS : end].float() @ direction for row, end in zip(stream, ends, strict=True)])
    low = (wanted - along[: len(taught)]).clamp_min(0).square().mean()
    return low + (along[len(taught) :].abs() - STILL).clamp_min(0).square().mean()


def train(settings: Settings, cache: Path) -> PeftModel:
    """Train the adapter and return the model that carries it."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    subject, tokenizer = load_subject(cache, FIRST)
    held = held_examples(subject, tokenizer, settings, cache)
    # whatever the subject makes of these refusals is held, so those it refuses stay refused, those it answers answered
    held += refused_examples(tokenizer, "harmful", settings.tokens, rng)[::SHARE]
    taught = refused_examples(tokenizer, "look_alike", settings.tokens, rng)
    some = [chat(tokenizer, text) for kind in ("harmful", "harmless", "look_alike") for text in read_prompts(kind)[:40]]
    return teach(subject, taught, held, settings, rng, objective, quiet(subject, some, settings))


if __name__ == "__main__":
    run(__doc__, OVER_REFUSING, train, SETTINGS)
