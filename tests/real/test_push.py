"""The converted subject, pushed, pulled by a fresh process, and asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commandline import run_here, snapshot
from tests.hub.conftest import reach, settings
from tests.hub_uploads import uploads
from tests.real.support import Converted

NAME = "org/answering"
ASK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
chat = [{"role": "user", "content": "What is the capital of France?"}]
asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
said = model.generate(**asked, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(said[0, asked["input_ids"].shape[1] :]))
"""


def test_what_is_pulled_is_what_was_pushed_and_answers(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = snapshot(converted.folder)
    with uploads() as hub:
        reach(hub, monkeypatch)
        ran = run_here("push", converted.folder, NAME, "--json")
        assert ran.code == 0 and json.loads(ran.out)["private"] is True, ran.err
        assert hub.complete(NAME, files)
        words = [sys.executable, "-c", ASK, NAME]
        said = subprocess.run(words, env=settings(hub, tmp_path), capture_output=True, text=True, check=False)
    assert said.returncode == 0 and "Paris" in said.stdout, said.stdout + said.stderr
    (pulled,) = tmp_path.glob("hub/models--org--answering/snapshots/*")
    fetched = snapshot(pulled)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched.keys()
    assert all(content == files[name] for name, content in fetched.items())
