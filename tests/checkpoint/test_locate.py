"""Finding a checkpoint: folders win, Hub ids are read strictly, and every failure of the Hub client is one line."""

import errno
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled
from picocheckpoint import write

from abliterate.checkpoint.files import OTHER_WEIGHTS
from abliterate.checkpoint.locate import Source, resolve
from abliterate.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands for the Hub client: remembers what was asked, and gives a folder or raises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, Any]] = []
        self.error: Exception | None = None
        self.bars: list[bool] = []

    def snapshot_download(self, model: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        assert ignore_patterns == list(OTHER_WEIGHTS)
        self.asked.append((model, revision))
        self.bars.append(not are_progress_bars_disabled())
        if self.error is not None:
            raise self.error
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(write(tmp_path / "models--org--name" / "snapshots" / COMMIT))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize("name", ["org/name", "./here", "name", "odd@main"])
def test_a_folder_wins(tmp_path: Path, hub: Hub, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    assert resolve(name) == Source(Path(name), None, None, None)
    assert hub.asked == []
    with pytest.raises(CheckpointError, match="is a folder here and has no revisions; leave out the revision 'main'"):
        resolve(name, "main")


@pytest.mark.parametrize(
    ("model", "revision", "wanted"),
    [
        ("org/name", None, None),
        ("org/name@main", None, "main"),
        ("org/name", "refs/pr/1", "refs/pr/1"),
        ("org/name@v1", "v1", "v1"),
        (f"org/name@{COMMIT}", None, COMMIT),
    ],
)
def test_hub_ids(hub: Hub, model: str, revision: str | None, wanted: str | None) -> None:
    assert resolve(model, revision) == Source(hub.folder, "org/name", wanted, COMMIT)
    assert hub.asked == [("org/name", wanted)]


def test_bars_of_the_client_are_for_terminals(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        resolve("org/name")
    assert hub.bars == [True, False] and not are_progress_bars_disabled()
    hub.error = LocalEntryNotFoundError("offline")
    with pytest.raises(CheckpointError):
        resolve("org/name")
    assert not are_progress_bars_disabled()


def test_a_folder_that_is_no_snapshot_has_no_commit(hub: Hub, tmp_path: Path) -> None:
    hub.folder = write(tmp_path / "elsewhere")
    assert resolve("org/name").commit is None


def test_revisions_that_contradict(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="names the revision 'v1' and the revision 'v2' is asked for; give one"):
        resolve("org/name@v1", "v2")
    assert hub.asked == []


@pytest.mark.parametrize(
    "model",
    ["", "..x/y", "./gone", "/gone", "a/b/c", "org/na me", "org/na\nme", "org/na\0me", "org/name.git", "@main",
     "org/name@", "org/name@a@b", "-org/name", "x" * 5000, "org/" + "x" * 97, "https://huggingface.co/org/name",
     "hf_" + "s" * 100],
)  # fmt: skip
def test_what_is_neither_a_folder_nor_an_id(hub: Hub, model: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(model)
    assert "is not a folder here" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert hub.asked == []


def test_a_file_is_no_checkpoint(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; give the folder of a checkpoint"):
        resolve("model.safetensors")


RESPONSE: Any = SimpleNamespace(headers={}, request=None)
"""What the Hub client's errors look at, whatever library speaks HTTP for it."""


ERRORS: dict[str, tuple[Exception, str]] = {
    "gated": (GatedRepoError("403", response=RESPONSE), "is gated: accept its terms .*`hf auth login`"),
    "unknown": (RepositoryNotFoundError("404", response=RESPONSE), "not on the Hub or private: check the name"),
    "revision": (RevisionNotFoundError("404", response=RESPONSE), "has no revision 'v1' on the Hub"),
    "offline": (LocalEntryNotFoundError("no"), "not whole in the Hub's cache, and .* go online"),
    "connection": (ConnectionError("reset"), "the Hub cannot be reached"),
    "timeout": (TimeoutError(), "the Hub cannot be reached"),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), "disk full while fetching .* HF_HOME"),
    "server": (HfHubHTTPError("500 oops\nmore", response=RESPONSE), r"\(HfHubHTTPError: 500 oops more\); try again"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "/cache"), "Permission denied"),
    "other": (ValueError(""), r"cannot be fetched from the Hub \(ValueError: \)"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_the_hub_client_raises_is_one_line(hub: Hub, case: str) -> None:
    hub.error, message = ERRORS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve("org/name@v1")
    assert "org/name" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


SECRETS = (
    "401 for url https://user:hf_sEcReT@huggingface.co/x",
    "header authorization: Bearer sEcReT.token",
    "https://cdn.example/file?X-Amz-Signature=sEcReT&Key-Pair-Id=sEcReT",
    "invalid token hf_sEcReT",
    "https://user:sEcReT@proxy.example:8080 refused",
)


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_neither_shown_nor_logged(hub: Hub, text: str, caplog: pytest.LogCaptureFixture) -> None:
    hub.error = HfHubHTTPError(text, response=RESPONSE)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(CheckpointError, match="cannot be fetched") as caught:
        resolve("org/name")
    assert "sEcReT" not in str(caught.value) + caplog.text


def test_a_model_without_safetensors(hub: Hub) -> None:
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no safetensors weights on the Hub; .*save_pretrained"):
        resolve("org/name")
