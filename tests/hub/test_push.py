"""Pushes to a Hub that works: what is there then, who sees it, where, and what is said."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.commandline import run_here, snapshot
from tests.hub.conftest import settings
from tests.hub_store import Blob, Fault, Repository, Store


def test_a_push_is_one_commit_and_the_link_is_printed(
    converted: Path, hub: Store, caplog: pytest.LogCaptureFixture
) -> None:
    ran = run_here("push", converted, "org/name")
    assert (ran.code, ran.err, caplog.text) == (0, "", "")
    assert ran.out.splitlines()[-1] == f"{hub.url}/org/name"
    repository = hub.repositories["org/name"]
    assert repository.private and len(repository.log) == 1
    assert hub.complete("org/name", snapshot(converted))
    assert set(hub.stored.values()) == {1} and len(hub.stored) == 5


def test_the_same_again_sends_nothing(converted: Path, hub: Store) -> None:
    run_here("push", converted, "org/name")
    received = hub.received
    ran = run_here("push", converted, "org/name", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["sent"], hub.received) == (0, [], received)
    assert found["commit"] == hub.repositories["org/name"].log[-1] and len(hub.repositories["org/name"].log) == 1
    assert (found["link"], found["private"], found["hashed"]) == (f"{hub.url}/org/name", True, True)


def test_large_files_in_parts(converted: Path, hub: Store) -> None:
    hub.part_bytes = 10_000
    assert run_here("push", converted, "org/name").code == 0
    assert hub.complete("org/name", snapshot(converted))
    assert any(request.startswith("POST /complete/") for request in hub.seen)


def test_a_fresh_process_loads_what_was_pushed(converted: Path, hub: Store, tmp_path: Path) -> None:
    assert run_here("push", converted, "org/name").code == 0
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
texts = []
for name in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    texts.append(model(torch.tensor([asked["input_ids"]])).logits)
assert torch.equal(*texts) and texts[0].isfinite().all()
"""
    words = [sys.executable, "-c", script, "org/name", str(converted)]
    done = subprocess.run(words, env=settings(hub, tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(request.startswith("GET /org/name/resolve/") for request in hub.seen)


def test_a_file_that_has_changed_is_sent_alone(converted: Path, hub: Store, tmp_path: Path) -> None:
    run_here("push", converted, "org/name")
    changed = shutil.copytree(converted, tmp_path / "copy")
    (changed / "README.md").write_text("# Another card\n")
    found = json.loads(run_here("push", changed, "org/name", "--json").out)
    assert found["sent"] == ["README.md"] and set(hub.stored.values()) == {1}
    assert hub.complete("org/name", snapshot(changed))


def test_shards_of_an_earlier_checkpoint_go_and_other_files_stay(converted: Path, hub: Store) -> None:
    hub.repositories["org/name"] = repository = Repository(private=True)
    old = {"model-00001-of-00002.safetensors": b"old", "model.gguf": b"mine", "adapter_model.safetensors": b"mine"}
    repository.commit("main", {name: Blob(content, False) for name, content in old.items()})
    found = json.loads(run_here("push", converted, "org/name", "--json").out)
    assert found["removed"] == ["model-00001-of-00002.safetensors"]
    assert repository.files().keys() - snapshot(converted).keys() == {"model.gguf", "adapter_model.safetensors"}


def test_files_that_are_left_out_are_told(
    converted: Path, hub: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = shutil.copytree(converted, tmp_path / "copy")
    (changed / "notes.txt").write_text("mine")
    assert json.loads(run_here("push", changed, "org/name", "--json").out)["left_out"] == ["notes.txt"]
    assert "notes.txt is left out" in caplog.text
    assert hub.complete("org/name", snapshot(converted))


def test_weights_without_hashes_are_told(
    converted: Path, hub: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = shutil.copytree(converted, tmp_path / "copy")
    manifest = json.loads((changed / "abliteration.json").read_text())
    for shard in manifest["output"]["shards"]:
        shard["sha256"] = None
    (changed / "abliteration.json").write_text(json.dumps(manifest))
    assert json.loads(run_here("push", changed, "org/name", "--json").out)["hashed"] is False
    assert "only their sizes were compared" in caplog.text and hub.complete("org/name", snapshot(changed))


def test_public_only_when_it_is_said(converted: Path, hub: Store) -> None:
    assert run_here("push", converted, "org/open", "--public").code == 0
    assert not hub.repositories["org/open"].private
    ran = run_here("push", converted, "org/open")
    assert ran.code == 1 and "is there already, and public: say --public" in ran.err
    assert run_here("push", converted, "org/open", "--private").code == 1
    assert run_here("push", converted, "org/open", "--public").code == 0
    run_here("push", converted, "org/closed")
    ran = run_here("push", converted, "org/closed", "--public")
    assert ran.code == 1 and "and private" in ran.err and hub.repositories["org/closed"].private


def test_a_branch_is_made_from_main(converted: Path, hub: Store) -> None:
    ran = run_here("push", converted, "org/name", "--revision", "next")
    assert ran.code == 0 and ran.out.splitlines()[-1] == f"{hub.url}/org/name/tree/next"
    assert hub.complete("org/name", snapshot(converted), "next")
    assert hub.repositories["org/name"].files("main").keys() == {".gitattributes"}
    assert run_here("push", converted, "org/name@next").code == 0
    assert len(hub.repositories["org/name"].log) == 1


def test_a_pull_request(converted: Path, hub: Store) -> None:
    hub.repositories["them/name"] = Repository(private=False)
    ran = run_here("push", converted, "them/name", "--create-pr")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, f"{hub.url}/them/name/discussions/1"), ran.err
    assert hub.complete("them/name", snapshot(converted), "refs/pr/1")
    assert hub.repositories["them/name"].files("main").keys() == {".gitattributes"}
    ran = run_here("push", converted, "org/missing", "--create-pr")
    assert ran.code == 1 and "no pull request can be opened" in ran.err
    ran = run_here("push", converted, "org/name", "--create-pr", "--revision", "next")
    assert ran.code == 1 and "opened against main" in ran.err


def test_a_dry_run_changes_nothing(converted: Path, hub: Store) -> None:
    ran = run_here("push", converted, "org/name", "--dry-run")
    assert ran.code == 0 and ran.out.startswith("dry run: org/name (private, main); 14 files")
    assert "model-00001-of-00004.safetensors" in ran.out
    assert hub.repositories == {} and hub.received == 0
    run_here("push", converted, "org/name")
    found = json.loads(run_here("push", converted, "org/name", "--dry-run", "--json").out)
    assert (found["commit"], found["sent"], found["created"]) == (None, [], False)
    assert len(hub.repositories["org/name"].log) == 1


@pytest.mark.parametrize("name", ["name", "org/a/b", "org/na me", "/name", "", "org/name@"])
def test_what_is_no_repository(converted: Path, hub: Store, name: str) -> None:
    ran = run_here("push", converted, name)
    assert ran.code == 1 and "name it as org/name" in ran.err and hub.seen == []


def test_a_gitignore_does_not_leave_files_out_in_silence(converted: Path, hub: Store) -> None:
    hub.ignored = r"tokenizer.*"
    ran = run_here("push", converted, "org/name")
    assert ran.code == 1 and "a .gitignore keeps tokenizer.json, tokenizer_config.json out of org/name" in ran.err
    assert hub.repositories["org/name"].log == []


def test_a_card_that_the_hub_does_not_take_is_told_before_anything_is_sent(
    converted: Path, hub: Store, tmp_path: Path
) -> None:
    changed = shutil.copytree(converted, tmp_path / "copy")
    (changed / "README.md").write_text("---\nlicense: nonsense\n---\n# Card\n")
    ran = run_here("push", changed, "org/name")
    assert ran.code == 1 and ran.err.count("\n") == 1 and "license" in ran.err and hub.received == 0


def test_offline_is_one_line(converted: Path, hub: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ran = run_here("push", converted, "org/name")
    assert (ran.code, ran.err.count("\n")) == (1, 1) and "HF_HUB_OFFLINE is set" in ran.err and hub.seen == []


def test_without_a_token(converted: Path, hub: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    ran = run_here("push", converted, "org/name")
    assert ran.code == 1 and "there is no token to push to org/name with: log in with `hf auth login`" in ran.err
    (tmp_path / "token").write_text(hub.token)
    assert run_here("push", converted, "org/name").code == 0


def test_a_folder_that_is_not_fit_is_not_sent(converted: Path, hub: Store, tmp_path: Path) -> None:
    failed = shutil.copytree(converted, tmp_path / "out.failed")
    ran = run_here("push", failed, "org/name")
    assert ran.code == 1 and "certificate failed" in ran.err
    assert hub.repositories == {} and hub.received == 0


def test_tokens_are_in_no_word_that_is_said(converted: Path, hub: Store, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "abliterate"), caplog.at_level(logging.DEBUG, "huggingface_hub"):
        ran = run_here("push", converted, "org/name", "-v")
    assert ran.code == 0 and "the token is that of tester" in caplog.text
    for word in (hub.token, "s3cr3t"):
        assert word not in caplog.text + ran.out + ran.err


def test_a_token_of_another_form_that_the_hub_repeats(
    converted: Path, hub: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "plain-token-of-a-proxy"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.faults = [Fault("repos/create", 418, headers={"X-Error-Message": f"what is {hub.token} for"})]
    ran = run_here("push", converted, "org/name")
    assert ran.code == 1 and "what is … for" in ran.err and hub.token not in ran.err
