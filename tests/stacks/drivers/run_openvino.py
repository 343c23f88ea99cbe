"""OpenVINO through optimum: exported when loaded."""

import torch
from driver import Answer, Clock, Request, run
from generating import generated
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer


def answer(model: str, form: str, request: Request, clock: Clock) -> list[Answer]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    precision = {"float32": "f32", "bfloat16": "bf16"}[form]
    settings = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    loaded = OVModelForCausalLM.from_pretrained(model, export=True, load_in_8bit=False, ov_config=settings)
    clock.lap("load")
    with torch.no_grad():
        found = generated(loaded, tokenizer, request)
    clock.lap("answer")
    return found


if __name__ == "__main__":
    run(answer, ["openvino", "optimum-intel", "transformers"])
