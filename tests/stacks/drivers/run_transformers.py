"""transformers: `from_pretrained` and `generate`."""

import torch
from driver import Answer, Clock, Request, run
from generating import generated
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(model: str, form: str, request: Request, clock: Clock) -> list[Answer]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, form)).eval()
    clock.lap("load")
    found = generated(loaded, tokenizer, request)
    clock.lap("answer")
    return found


if __name__ == "__main__":
    run(answer, ["transformers", "torch"])
