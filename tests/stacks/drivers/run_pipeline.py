"""transformers' pipeline for text generation, which renders the chat itself."""

import torch
from driver import Answer, Clock, Request, run, until
from transformers import pipeline


def answer(model: str, form: str, request: Request, clock: Clock) -> list[Answer]:
    pipe = pipeline("text-generation", model=model, dtype=getattr(torch, form))
    clock.lap("load")
    chats, tokenizer = request["conversations"], pipe.tokenizer
    given = {"do_sample": False, "max_new_tokens": request["max_new_tokens"]}
    answers = []
    for chat, found in zip(chats, pipe(chats, return_tensors=True, batch_size=len(chats), **given), strict=True):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        tokens = until(_after(list(found[0]["generated_token_ids"]), prompt), [tokenizer.eos_token_id])
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append({"tokens": tokens, "text": text, "prompt_tokens": len(prompt)})
    # the last one as most callers ask: a chat in, the chat with one more message out
    answers[-1]["text"] = pipe(chats[-1], **given)[0]["generated_text"][-1]["content"]
    clock.lap("answer")
    return answers


def _after(tokens: list[int], prompt: list[int]) -> list[int]:
    """What follows the prompt, whatever stands before it."""
    starts = range(len(tokens) - len(prompt) + 1)
    start = next(i for i in starts if tokens[i : i + len(prompt)] == prompt)
    return tokens[start + len(prompt) :]


if __name__ == "__main__":
    run(answer, ["transformers", "torch"])
