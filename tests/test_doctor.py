"""`abliterate doctor`: what it says, what it keeps to itself, and that it works where libraries do not."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from abliterate import __version__
from abliterate.doctor import examine, hub, machine, report, software
from abliterate.doctor.report import Examination, Finding, Section, anonymous
from tests.commandline import OFFLINE, run, run_here

SECRET = "hf_thisIsASecretToken"
PARTS = ["versions", "extras", "system", "devices", "memory", "disk", "hub", "streaming"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that need no library."""
    monkeypatch.setattr(examine, "PARTS", (hub.hub, machine.system))


def test_a_sound_installation() -> None:
    started = time.monotonic()
    ran = run("doctor", "--json")
    assert time.monotonic() - started < 60, "10 s on a machine that does nothing else"
    found = json.loads(ran.out)
    assert (ran.code, ran.err, found["broken"]) == (0, "", False)
    assert set(PARTS) < set(found)
    assert found["versions"]["abliterate"] == __version__ and found["versions"]["python"] == sys.version.split()[0]
    assert found["memory"]["auto_bytes"] > 0 and found["disk"]["this_folder_free_bytes"] > 0
    assert found["streaming"]["fast_path"] == "works" and "threads" in found["devices"]["cpu"]


def test_for_people() -> None:
    ran = run_here("doctor")
    assert (ran.code, ran.err) == (0, "")
    assert f"abliterate: {__version__}" in ran.out and re.search(r"auto: [\d.]+ GB", ran.out)
    assert "_bytes" not in ran.out and "nothing is wrong" in ran.out


def test_a_token_is_told_of_and_not_told(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in hub.TOKEN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert hub.hub().facts["token"] == "none"
    (tmp_path / "token").write_text(SECRET)
    assert str(hub.hub().facts["token"]).startswith("present, from ")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{SECRET}@proxy:1")
    monkeypatch.setattr(constants, "ENDPOINT", f"https://me:{SECRET}@hub.example:8443/at?key={SECRET}")
    for words in (["doctor"], ["doctor", "--json"]):
        ran = run_here(*words)
        assert SECRET not in ran.out + ran.err
        assert "present, from the variable HF_TOKEN" in ran.out and "HTTPS_PROXY set" in ran.out
        assert "https://hub.example:8443/at" in ran.out and "me:" not in ran.out


def test_the_token_is_not_read(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its file may be one that only its owner's tools should open."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text(SECRET)
    opened: list[str] = []
    sys.addaudithook(lambda event, found: opened.append(str(found[0])) if event == "open" else None)
    run_here("doctor")
    assert opened and str(tmp_path / "token") not in opened


def test_paths_tell_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr(report, "_user", lambda: "alice")
    assert anonymous("/home/alice") == "~"
    assert anonymous("/home/alice/cache") == "~/cache"
    assert anonymous("/scratch/alice/hub") == "/scratch/<user>/hub"
    assert anonymous("/home/alicette/x") == "/home/alicette/x"
    assert anonymous("cannot open /home/alice/lib.so: no\nsuch file") == "cannot open ~/lib.so: no such file"


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(report.getpass, "getuser", nobody)
    assert anonymous("/data/hub") == "/data/hub"


@pytest.mark.parametrize(
    ("need", "words"),
    [("no-such-package>=2", "no-such-package is missing"), ("torch>=99", "torch .* is not supported; needed is >=99")],
)
def test_what_is_missing_or_too_old_is_broken(need: str, words: str) -> None:
    (found,) = software.unmet([Requirement(need)])
    assert found.level == "broken" and re.fullmatch(words, found.what) and need in found.hint


def test_what_is_installed_is_what_is_required() -> None:
    needs = [need for need in software.requirements() if need.marker is None]
    assert {"torch", "transformers", "safetensors", "click"} <= {need.name for need in needs}
    assert software.unmet(needs) == []


def test_newer_than_what_was_tested_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.newer() == []
    monkeypatch.setattr(software, "TESTED", {"torch": "2.6", "transformers": "99.0"})
    (found,) = software.newer()
    assert found.level == "note" and "torch" in found.what and "2.6" in found.hint


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    """Its own words are told, everything else all the same, and the exit code is 1."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise ImportError('libcudnn.so.9: cannot open shared object file')"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from abliterate.cli import main; main()"
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(Path(__file__).parents[1])}
    import subprocess

    command = [sys.executable, "-c", code, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert done.stderr == (
        "error: torch does not load: libcudnn.so.9: cannot open shared object file; "
        "pip install --force-reinstall torch\n"
    )
    found = json.loads(done.stdout)
    assert found["broken"] and found["devices"] == {"torch": "does not load"} and found["hub"]["endpoint"]


def test_a_changed_library_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from abliterate.architecture import conversion

    monkeypatch.setattr(conversion, "trouble", lambda: "embed.weight is not filled as it should be")
    section = software.fast_path()
    assert section.facts["fast_path"] == "not usable: embed.weight is not filled as it should be"
    assert [found.level for found in section.findings] == ["note"]


def test_memory_says_who_sets_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from abliterate.calibration import memory

    monkeypatch.setattr(memory, "limits", lambda: {"machine": 50 << 30, "ulimit -v": 1 << 30})
    section = machine.memory()
    assert section.facts["auto_bytes"] == 1 << 30 and section.facts["limited_by"] == "ulimit -v"
    assert section.facts["left_by_ulimit_v_bytes"] == 1 << 30
    assert [found.what for found in section.findings] == ["little memory is left"]


def test_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine, "_temporary", full)
    (found,) = [each for each in machine.disks().findings if each.level == "broken"]
    assert "temporary files" in found.what and "TMPDIR" in found.hint


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="13.0", hip=None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_driver", lambda: True)
    assert [found.what for found in machine.devices().findings] == ["there is an NVIDIA driver, but torch sees no GPU"]


def test_a_gpu_is_told_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 << 30, 8 << 30))
    facts = machine.devices().facts
    assert facts["cuda:0"] == "Some GPU" and facts["cuda:0_free_bytes"] == 3 << 30


def test_the_size_of_a_cache(tmp_path: Path) -> None:
    blobs = tmp_path / "models--acme--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a").write_bytes(b"x" * 1000)
    (tmp_path / "models--acme--tiny" / "link").symlink_to(blobs / "a")
    assert hub.folder_size(tmp_path) == (1000, True)
    assert hub.folder_size(tmp_path, seconds=-1)[1] is False
    facts, findings = hub.cache_facts(tmp_path)
    assert (facts["cached_models"], facts["cache_used_bytes"], findings) == (1, 1000, [])
    assert hub.cache_facts(tmp_path / "none" / "yet")[0]["cached_models"] == 0


@pytest.mark.parametrize(
    ("address", "shown"),
    [("https://huggingface.co", "https://huggingface.co"), ("http://[::1]:80/x", "http://[::1]:80/x"),
     ("https://u:p@h/a?b=c#d", "https://h/a"), ("nonsense", "not an address"), ("http://h:port", "not an address")],
)  # fmt: skip
def test_addresses_without_secrets(address: str, shown: str) -> None:
    assert hub.bare(address) == shown


def test_the_worst_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(level: str) -> Callable[[], Section]:
        return lambda: Section(level, {}, (Finding(level, f"a {level}", "mend it"),))  # type: ignore[arg-type]

    monkeypatch.setattr(examine, "PARTS", (part("note"), part("broken")))
    found = examine.examine()
    assert [each.level for each in found.findings] == ["broken", "note"] and found.broken
    assert not Examination((part("note")(),)).broken
    ran = run_here("doctor")
    assert ran.code == 1 and ran.err == "error: a broken; mend it\n" and "note: a note; mend it" in ran.out
