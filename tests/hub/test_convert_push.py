"""`convert --push-to`: shards go up while the conversion goes on, the commit waits for the certificate."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from abliterate import conversion
from abliterate.edit import projections
from tests.commandline import names, run_here, snapshot
from tests.hub_store import Fault, Repository, Store


@pytest.fixture
def words(converted: Path, tmp_path: Path) -> list[str]:
    room = converted.parent
    given = ["--direction", str(room / "r.safetensors"), "--no-evaluate", "--push-to", "org/name"]
    return ["convert", str(room / "base"), str(tmp_path / "out"), *given]


def test_out_is_what_is_pushed(words: list[str], hub: Store, tmp_path: Path) -> None:
    ran = run_here(*words)
    assert (ran.code, ran.err) == (0, "") and ran.out.splitlines()[-1] == f"{hub.url}/org/name"
    assert hub.complete("org/name", snapshot(tmp_path / "out"))
    repository = hub.repositories["org/name"]
    assert repository.private and len(repository.log) == 1 and set(hub.stored.values()) == {1}
    assert not [name for name, content in snapshot(tmp_path).items() if hub.token.encode() in content]


def test_the_result_is_the_one_without_a_push(words: list[str], hub: Store, converted: Path, tmp_path: Path) -> None:
    ran = run_here(*words, "--json", "--public")
    found = json.loads(ran.out)
    assert found["pushed"]["link"] == f"{hub.url}/org/name" and found["pushed"]["private"] is False
    assert snapshot(tmp_path / "out") == snapshot(converted)


def test_shards_go_up_before_the_certificate(
    words: list[str], hub: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove, seen = conversion.prove, []

    def prove_late(*given: Any) -> Any:
        end = time.monotonic() + 20
        while len(hub.stored) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        seen.append((len(hub.stored), hub.repositories["org/name"].log[:]))
        return prove(*given)

    monkeypatch.setattr(conversion, "prove", prove_late)
    assert run_here(*words).code == 0
    assert seen == [(4, [])]


def test_a_certificate_that_fails_commits_nothing(
    words: list[str], hub: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(projections.LocalProjection, "apply", lambda self, rows, block: block.clone())
    ran = run_here(*words)
    assert ran.code == 1 and "certificate failed" in ran.err and names(tmp_path) == ["out.failed"]
    assert hub.repositories["org/name"].log == [] and "nothing was committed to org/name" in caplog.text


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("whoami", 401), "does not take the token (401)"),
        (Fault("repos/create", 403), "may not write to org/name (403)"),
        (Fault("preupload", 403), "may not write to org/name (403)"),
    ],
)
def test_it_is_known_before_any_work_whether_it_can_be_pushed(
    words: list[str], hub: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, said: str
) -> None:
    if fault.request == "preupload":
        hub.repositories["org/name"] = Repository(private=True)
    hub.faults = [fault]
    monkeypatch.setattr(conversion, "opened", lambda *_: pytest.fail("work was begun"))
    ran = run_here(*words)
    assert ran.code == 1 and said in ran.err and ran.err.count("\n") == 1 and names(tmp_path) == []


def test_a_commit_that_is_refused_costs_no_work(words: list[str], hub: Store, tmp_path: Path) -> None:
    hub.faults = [Fault("/commit/", 403)]
    ran = run_here(*words)
    assert ran.code == 1 and "may not write" in ran.err and names(tmp_path) == [".out.abliterate-work"]
    assert run_here(*words).code == 0 and hub.complete("org/name", snapshot(tmp_path / "out"))


def test_a_hub_that_goes_away_costs_no_work(
    words: list[str], hub: Store, tmp_path: Path, naps: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [Fault("PUT /lfs/", cut=20_000, times=-1, after=2)]
    ran = run_here(*words)
    assert ran.code == 1 and ran.err.count("\n") == 1 and "run the same command again" in ran.err
    assert hub.repositories["org/name"].log == [] and names(tmp_path) == [".out.abliterate-work"]
    assert "the conversion goes on, and sends what is missing in the end" in caplog.text
    hub.faults = []
    assert run_here(*words).code == 0 and names(tmp_path) == ["out"]
    assert hub.complete("org/name", snapshot(tmp_path / "out")) and set(hub.stored.values()) == {1}


def test_without_hashes(words: list[str], hub: Store, tmp_path: Path) -> None:
    ran = run_here(*words, "--no-hash", "--json")
    assert ran.code == 0 and json.loads(ran.out)["pushed"]["hashed"] is False
    assert hub.complete("org/name", snapshot(tmp_path / "out"))


def test_a_commit_whose_run_was_stopped_right_after_it(
    words: list[str], hub: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        ran = run_here(*words)
    assert (ran.code, ran.err.strip()) == (130, "interrupted: run the same command again to continue")
    assert run_here(*words).code == 0 and hub.complete("org/name", snapshot(tmp_path / "out"))
    assert len(hub.repositories["org/name"].log) == 1 and set(hub.stored.values()) == {1}


def test_a_dry_run_makes_nothing(words: list[str], hub: Store, tmp_path: Path) -> None:
    ran = run_here(*words, "--dry-run")
    assert ran.code == 0 and "org/name would be made, private, and the result pushed to it" in ran.out
    assert hub.repositories == {} and names(tmp_path) == []


def test_what_makes_no_sense_is_usage(words: list[str], hub: Store) -> None:
    ran = run_here(*words[:-2], "--public")
    assert ran.code == 2 and "--private and --public go with --push-to" in ran.err and hub.seen == []
    ran = run_here(*words[:-1], "name")
    assert ran.code == 1 and "name it as org/name" in ran.err


def test_verbose_says_what_was_sent(words: list[str], hub: Store, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "abliterate"), caplog.at_level(logging.DEBUG, "huggingface_hub"):
        assert run_here(*words, "-v").code == 0
    assert "sent model-00001-of-00004.safetensors" in caplog.text and hub.token not in caplog.text
