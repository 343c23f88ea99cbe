"""A Hub that fails: every push ends complete, or in one line with nothing half-made, and can be run again."""

import logging
import shutil
from pathlib import Path

import pytest

from abliterate.hub.upload import Upload
from tests.commandline import run_here, snapshot
from tests.hub_store import Fault, Repository, Store

ALWAYS = -1
COMMIT = "POST /api/models/org/name/commit"
PUT = "PUT /lfs/"
BATCH = "info/lfs/objects/batch"
CONFLICT = b"Cannot create repo: another conflicting operation is in progress"

SURVIVED = {
    "whoami 429": Fault("whoami", 429, headers={"Retry-After": "7"}),
    "whoami 503 twice": Fault("whoami", 503, times=2),
    "create 500": Fault("repos/create", 500),
    "create 409 while another one is made": Fault("repos/create", 409, body=CONFLICT),
    "tree 502": Fault("GET .*/tree/", 502),
    "preupload 500": Fault("preupload", 500),
    "batch 429": Fault(BATCH, 429, headers={"Retry-After": "7"}),
    "put 500": Fault(PUT, 500, times=2),
    "put cut at once": Fault(PUT, cut=0),
    "put cut in the middle": Fault(PUT, cut=30_000, after=1),
    "put cut three times": Fault(PUT, cut=17_000, times=3),
    "put answer lost": Fault(PUT, late=True),
    "verify 500": Fault("POST /verify", 500),
    "verify cut": Fault("POST /verify", cut=0),
    "commit 429": Fault(COMMIT, 429, headers={"Retry-After": "7"}),
    "commit 500": Fault(COMMIT, 500),
    "commit 503 twice": Fault(COMMIT, 503, times=2),
    "commit cut in the middle": Fault(COMMIT, cut=1000),
    "commit answer lost": Fault(COMMIT, late=True),
    "tree 500 after the commit": Fault("GET .*/tree/", 500, after=1),
}
FATAL = {
    "whoami 401": (Fault("whoami", 401), "does not take the token (401)"),
    "create 403": (Fault("repos/create", 403), "may not write to org/name (403)"),
    "preupload 401": (Fault("preupload", 401, headers={"X-Error-Message": "expired"}), "(401)"),
    "batch 403": (Fault(BATCH, 403), "may not write to org/name (403)"),
    "put 403": (Fault(PUT, 403, after=2), "may not write to org/name (403)"),
    "put 500 for ever": (Fault(PUT, 500, ALWAYS), "the Hub failed (500); run the same command again"),
    "put cut for ever": (Fault(PUT, times=ALWAYS, cut=20_000), "broke"),
    "batch 429 for ever": (Fault(BATCH, 429, ALWAYS), "asks to slow down (429)"),
    "commit 401": (Fault(COMMIT, 401), "(401)"),
    "commit 403": (Fault(COMMIT, 403), "may not write to org/name (403)"),
    "commit 409": (Fault(COMMIT, 409), "another change to org/name is under way (409)"),
    "commit 412": (Fault(COMMIT, 412), "org/name has changed meanwhile (412)"),
    "commit 429 for ever": (Fault(COMMIT, 429, ALWAYS), "asks to slow down (429)"),
    "commit 500 for ever": (Fault(COMMIT, 500, ALWAYS), "the Hub failed (500)"),
    "commit cut for ever": (Fault(COMMIT, times=ALWAYS, cut=1), "the connection to http://127.0.0.1"),
}


@pytest.mark.parametrize("fault", SURVIVED.values(), ids=SURVIVED)
def test_a_fault_that_passes(
    converted: Path, hub: Store, naps: list[float], fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [Fault(**vars(fault))]
    ran = run_here("push", converted, "org/name")
    assert ran.code == 0, ran.err
    assert hub.faults[0].times == 0, "it never came to that"
    assert hub.complete("org/name", snapshot(converted)) and len(hub.repositories["org/name"].log) == 1
    assert set(hub.stored.values()) == {1} or fault.late
    if fault.headers:
        assert max(naps) >= 7
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [line for line in said if "Rate limited" not in line]


@pytest.mark.parametrize(("fault", "words"), FATAL.values(), ids=FATAL)
def test_a_fault_that_stays(converted: Path, hub: Store, naps: list[float], fault: Fault, words: str) -> None:
    hub.faults = [Fault(**vars(fault))]
    ran = run_here("push", converted, "org/name")
    assert (ran.code, ran.out) == (1, "") and ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert words in ran.err, ran.err
    assert hub.token not in ran.err and "s3cr3t" not in ran.err
    assert "org/name" not in hub.repositories or hub.repositories["org/name"].log == []
    received = sum(map(len, hub.large.values()))
    hub.faults, before = [], hub.received
    assert run_here("push", converted, "org/name").code == 0
    assert hub.complete("org/name", snapshot(converted)) and len(hub.repositories["org/name"].log) == 1
    assert set(hub.stored.values()) == {1}
    assert hub.received - before == sum(map(len, hub.large.values())) - received


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(
    converted: Path, hub: Store, naps: list[float]
) -> None:
    hub.repositories["org/name"] = Repository(private=True)
    hub.faults = [Fault(COMMIT, late=True)]
    ran = run_here("push", converted, "org/name", "--create-pr")
    assert ran.code == 1 and f"look at {hub.url}/org/name/discussions before" in ran.err
    assert hub.repositories["org/name"].pulls == 1


def test_another_commit_meanwhile_is_not_overwritten(
    converted: Path, hub: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Upload.send

    def send_late(self: Upload, items: object) -> None:
        send(self, items)  # type: ignore[arg-type]
        repository = hub.repositories["org/name"]
        repository.commit("main", dict(repository.files()))

    monkeypatch.setattr(Upload, "send", send_late)
    ran = run_here("push", converted, "org/name")
    assert ran.code == 1 and "has changed meanwhile (412)" in ran.err


def test_a_file_that_changes_while_it_is_sent(
    converted: Path, hub: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed, send = shutil.copytree(converted, tmp_path / "copy"), Upload.send

    def send_late(self: Upload, items: object) -> None:
        send(self, items)  # type: ignore[arg-type]
        (changed / "README.md").write_text("# Another\n")

    monkeypatch.setattr(Upload, "send", send_late)
    ran = run_here("push", changed, "org/name")
    assert ran.code == 1 and "has changed while it was pushed" in ran.err
    assert hub.repositories["org/name"].log == []
