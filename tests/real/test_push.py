"""The converted subject, pushed, pulled by a fresh process, and asked."""

import json
import subprocess
import sys
from pathlib import Path

from tests.commandline import snapshot
from tests.hub.conftest import settings
from tests.hub_uploads import uploads
from tests.real.support import Converted

ASK = """
import sys, json
from transformers import pipeline
chat = [{"role": "user", "content": "What is the capital of France?"}]
said = [pipeline("text-generation", name)(chat, max_new_tokens=12, do_sample=False) for name in sys.argv[1:]]
print(json.dumps([answer[0]["generated_text"][-1]["content"] for answer in said]))
"""


def test_a_pushed_model_answers_as_the_files_do(converted: Converted, tmp_path: Path) -> None:
    with uploads() as hub:
        environment = settings(hub, tmp_path)
        words = [sys.executable, "-m", "abliterate", "push", str(converted.folder), "org/answering", "--json"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["private"] is True
        assert hub.complete("org/answering", snapshot(converted.folder))
        asked = [sys.executable, "-c", ASK, "org/answering", str(converted.folder)]
        said = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    pulled, local = json.loads(said.stdout)
    assert pulled == local and "Paris" in pulled
