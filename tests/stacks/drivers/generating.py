"""Stacks that keep transformers' `generate`: all prompts at once, padded on the left."""

from typing import Any

import torch
from driver import Answer, Request, until


def generated(model: Any, tokenizer: Any, request: Request) -> list[Answer]:
    """Greedy answers."""
    prompts = request["prompts"]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    end = model.generation_config.eos_token_id
    found = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=request["max_new_tokens"], pad_token_id=0
    )
    answers = [until(row, end if isinstance(end, list) else [end]) for row in found[:, width:].tolist()]
    return [
        {"tokens": tokens, "text": tokenizer.decode(tokens, skip_special_tokens=True), "prompt_tokens": len(prompt)}
        for tokens, prompt in zip(answers, prompts, strict=True)
    ]
