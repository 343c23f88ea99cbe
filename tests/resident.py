"""Pico models in memory, reached as the tool reaches them, and byte-level tokenizers for them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from abliterate.calibration.hooks import Stream
from abliterate.calibration.model import LanguageModel

Load = Callable[..., LanguageModel]
"""Gives a model of a family: see `load` in direction/conftest.py."""
VOCABULARY, HIDDEN = 97, 24
END = 3


def llama(seed: int = 0, layers: int = 3, hidden: int = HIDDEN, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A random Llama whose weights are large enough that every layer matters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=40, num_hidden_layers=layers,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.3,
        eos_token_id=END, bos_token_id=1, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def gpt2(seed: int = 0, layers: int = 2, hidden: int = HIDDEN) -> GPT2LMHeadModel:
    """A random GPT-2: learned absolute positions, a tied head, biases."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=hidden, n_layer=layers, n_head=2, n_positions=128, initializer_range=0.3,
        eos_token_id=END, bos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.3)
    return model


def writers_of(model: Any) -> dict[str, nn.Module]:
    """The modules of either model that write to the residual stream, by name."""
    ends = ("embed_tokens", "o_proj", "down_proj", "wte", "wpe", "attn.c_proj", "mlp.c_proj")
    return {name: module for name, module in model.named_modules() if name.endswith(ends)}


def resident(model: Any, batch_size: int = 4, tokenizer: Any = None, tied_head: bool = False) -> LanguageModel:
    """The model as the tool holds it."""
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    writers, head = writers_of(model), model.get_output_embeddings()
    hidden = model.config.hidden_size
    stream = Stream(tuple(writers.values()), tuple(writers), tuple(layers), hidden, head if tied_head else None)
    return LanguageModel(model, tokenizer, stream, head, batch_size)


def random_prompts(count: int, seed: int = 0, shortest: int = 5, longest: int = 14) -> list[list[int]]:
    """Token ids of several lengths, without end tokens, in no order of length."""
    made = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=made).tolist()
    return [torch.randint(END + 1, VOCABULARY, (n,), generator=made).tolist() for n in lengths]


def random_units(count: int, hidden: int = HIDDEN, seed: int = 0) -> Tensor:
    """Unit vectors [count, hidden]."""
    drawn = torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=-1, keepdim=True)


def byte_tokenizer(
    special: Sequence[str] = (),
    merges: Sequence[tuple[str, str]] = (),
    template: str | None = None,
    adds_bos: bool = False,
    words: Sequence[str] = (),
    **names: str | None,
) -> PreTrainedTokenizerFast:
    """One token a byte, a merge and a word, after `<s>`, `</s>` and the special ones; `adds_bos` puts `<s>` first."""
    order = ["<s>", "</s>", *special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*order, *alphabet, *map("".join, merges)])}
    made = Tokenizer(models.BPE(vocabulary, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in order])
    made.add_tokens([AddedToken(word, normalized=False) for word in words])
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    known: dict[str, str | None] = {"bos_token": "<s>", "eos_token": "</s>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **known)
