"""Files of the Hub by range, through the real client: cut, failing, lying, moving; and what then lies on the disk."""

import hashlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError

from abliterate.checkpoint import patience
from abliterate.checkpoint import remote as room
from abliterate.checkpoint.crew import StoppedError
from abliterate.checkpoint.download import fetch
from abliterate.checkpoint.keeper import go_on
from abliterate.checkpoint.remote import Remote, look
from abliterate.errors import CheckpointError, HubError
from abliterate.progress import SILENT
from tests import hub_client
from tests.hub_server import COMMIT, Hub, serving

BYTES = random.Random(0).randbytes(300_000)
NAME = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / NAME).write_bytes(BYTES)
    (folder / "config.json").write_bytes(b"{}")
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0, 0.0))
    with serving("org/pico", folder) as hub:
        hub_client.use(hub, str(tmp_path / "home"), monkeypatch)
        yield hub


def fetched(tmp_path: Path, remote: Remote, name: str = NAME) -> int:
    return fetch(remote, remote.files[name], tmp_path / "partial", tmp_path / "final", SILENT, go_on)


def test_what_a_commit_holds(hub: Hub) -> None:
    remote = look("org/pico", "main")
    assert (remote.model_id, remote.commit) == ("org/pico", COMMIT)
    file = remote.files[NAME]
    assert (file.size, file.sha256, file.digest) == (len(BYTES), hashlib.sha256(BYTES).hexdigest(), file.sha256)
    assert remote.files["config.json"].sha256 is None
    assert remote.read(NAME, 100, 5000) == BYTES[100:5000] and hub.sent[NAME] == 4900


@pytest.mark.parametrize("small", [False, True])
def test_a_file_arrives_with_its_hash(hub: Hub, tmp_path: Path, small: bool) -> None:
    hub.small |= {NAME} if small else set()
    remote = look("org/pico", None)
    assert (remote.files[NAME].sha256 is None) == small
    assert fetched(tmp_path, remote) == len(BYTES)
    assert (tmp_path / "final").read_bytes() == BYTES and not (tmp_path / "partial").exists()


def test_a_connection_that_is_cut_is_taken_up_where_it_was_cut(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[NAME] = [70_000, 0, 100_000, 0, 0, 1]
    assert fetched(tmp_path, look("org/pico", None)) == len(BYTES)
    assert (tmp_path / "final").read_bytes() == BYTES and not hub.cuts[NAME]
    assert hub.sent[NAME] == len(BYTES)


def test_a_server_that_always_cuts_is_given_up_and_what_came_stays(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[NAME] = [70_000, *[0] * 9]
    remote = look("org/pico", None)
    with pytest.raises(HubError, match="org/pico cannot be fetched from the Hub"):
        fetched(tmp_path, remote)
    assert (tmp_path / "partial").read_bytes() == BYTES[:70_000] and len(hub.cuts[NAME]) == 6
    hub.cuts.clear()
    assert fetched(tmp_path, remote) == len(BYTES) - 70_000
    assert (tmp_path / "final").read_bytes() == BYTES and hub.sent[NAME] == len(BYTES)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_passing_failure_is_tried_again(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.faults[NAME] = [status] * 3
    assert fetched(tmp_path, look("org/pico", None)) == len(BYTES)


@pytest.mark.parametrize(("status", "left"), [(401, 8), (403, 8), (404, 8), (500, 5)])
def test_a_lasting_failure_is_one_line_without_the_token(
    hub: Hub, tmp_path: Path, status: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    remote = look("org/pico", None)
    hub.faults[NAME] = [status] * 9
    with pytest.raises(HubError) as caught:
        fetched(tmp_path, remote)
    assert len(hub.faults[NAME]) == left and "hf_secretsecretsecret" in hub.tokens
    assert "org/pico" in str(caught.value) and "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert not (tmp_path / "final").exists()


def test_bytes_with_another_hash_get_no_name(hub: Hub, tmp_path: Path) -> None:
    hub.altered.add(NAME)
    with pytest.raises(HubError, match=f"{NAME} of org/pico does not arrive with the hash that the Hub names"):
        fetched(tmp_path, look("org/pico", None))
    assert not (tmp_path / "final").exists() and (tmp_path / "partial").stat().st_size == 0


@pytest.mark.parametrize("left", [BYTES[:1000] + bytes(1000), bytes(len(BYTES)), BYTES + b"x", b""])
def test_what_lies_there_is_not_trusted(hub: Hub, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "partial").write_bytes(left)
    fetched(tmp_path, look("org/pico", None))
    assert (tmp_path / "final").read_bytes() == BYTES


def test_a_whole_file_that_lies_there_is_not_sent_again(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "partial").write_bytes(BYTES)
    assert fetched(tmp_path, look("org/pico", None)) == 0 and hub.sent[NAME] == 0


def test_a_branch_that_moves_meanwhile_is_not_mixed(hub: Hub, tmp_path: Path) -> None:
    remote = look("org/pico", "main")
    hub.commits[COMMIT], hub.commit, hub.folder = hub.folder, "f" * 40, tmp_path / "moved"
    hub.folder.mkdir()
    (hub.folder / NAME).write_bytes(bytes(len(BYTES)))
    fetched(tmp_path, remote)
    assert (tmp_path / "final").read_bytes() == BYTES
    assert look("org/pico", "main").commit == "f" * 40


def test_ranges_of_a_long_file_are_joined(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "RANGE_BYTES", 70_001)
    assert fetched(tmp_path, look("org/pico", None)) == len(BYTES)
    assert (tmp_path / "final").read_bytes() == BYTES


def test_a_server_without_ranges_sends_what_is_thrown_away(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    assert look("org/pico", None).read(NAME, 123_456, 200_000) == BYTES[123_456:200_000]
    (tmp_path / "partial").write_bytes(BYTES[:123_456])
    fetched(tmp_path, look("org/pico", None))
    assert (tmp_path / "final").read_bytes() == BYTES


def test_waiting_can_be_stopped(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", (60.0,))
    remote, started = look("org/pico", None), time.monotonic()
    hub.faults[NAME] = [500]

    def check() -> None:
        if time.monotonic() > started + 0.3:
            raise StoppedError

    with pytest.raises(StoppedError):
        fetch(remote, remote.files[NAME], tmp_path / "partial", tmp_path / "final", SILENT, check)
    assert time.monotonic() < started + 10


def test_names_that_lead_out_of_the_repository_are_no_files(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    made = hub.sibling
    evil = ["../evil.safetensors", "/etc/evil.safetensors", "a/../../evil.safetensors", "a\\evil.safetensors"]
    monkeypatch.setattr(hub, "files", lambda: [hub.folder / NAME] * 5)
    names = iter([*evil, NAME])
    monkeypatch.setattr(hub, "sibling", lambda path: made(path) | {"rfilename": next(names)})
    assert [*look("org/pico", None).files] == [NAME]


def test_no_such_repository(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="not on the Hub or private"):
        look("org/other", None)


def test_client_errors_are_the_ones_that_are_told_apart(hub: Hub) -> None:
    hub.faults[NAME] = [404]
    with pytest.raises(HfHubHTTPError):
        look("org/pico", None).read(NAME, 0, 10)
