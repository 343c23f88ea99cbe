"""The snippet of the card that loads and runs the model."""

import json
from collections.abc import Mapping
from typing import Any

from abliterate.publish.markdown import block, code

_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(name{remote})
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto"{remote})

"""
_CHAT = """\
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
"""
_PLAIN = """\
inputs = tokenizer("The sky is blue because", return_tensors="pt").to(model.device)
"""
_RUN = """\
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def usage(manifest: Mapping[str, Any], name: str) -> str:
    """Text and snippet; a chat when the model has a template of its own, else a completion."""
    remote = ", trust_remote_code=True" if any(file.endswith(".py") for file in manifest["output"]["files"]) else ""
    stream, calibration = manifest["certificate"]["stream"], manifest["calibration"]
    source = calibration["chat"]["template_source"] if calibration else "model"
    chat = bool(calibration or (stream and stream["text"] == "chat"))
    lines = ["No hooks are needed: whatever loads the base loads this."]
    if chat and source != "model":
        lines.append(f"The tokenizer has no chat template; the direction was found with {code(source)}.")
    snippet = (
        _LOAD.format(name=json.dumps(name), remote=remote) + (_CHAT if chat and source == "model" else _PLAIN) + _RUN
    )
    return "\n\n".join([*lines, block(snippet, "python")])
