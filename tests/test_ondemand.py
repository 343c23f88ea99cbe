"""Conversions of a Hub model whose shards are fetched as they are needed: within the limit, and to the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from abliterate import conversion, dryrun, find, verification
from abliterate.checkpoint import patience, room
from abliterate.checkpoint.ondemand import located
from abliterate.errors import AbliterateError, CheckpointError, HubError, OutputError
from abliterate.subject import RunOptions
from tests import hub_client, pico
from tests.commandline import snapshot
from tests.hub_server import BLOCK, COMMIT, Hub, serving
from tests.hub_watch import FETCHED, least, passes, shards, watched

MODEL = "org/pico"
SIZES = {"num_hidden_layers": 8, "intermediate_size": 1000}
QUICK = """
name: quick
calibration: {train: 8, validation: 2, test: 1}
direction: {filter: false, refusal_tokens: [I, S], positions: 1}
selection: {max_kl: 1000000.0, min_induce: -1000000.0}
evaluation: {max_new_tokens: 2}
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    pico.save(folder, "llama", shards=6, tokenizer=True, **SIZES)
    (folder / "README.md").write_text("# Pico\n")
    pico.direction_file(folder / "extra" / "other.safetensors", 7)
    return folder


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.direction_file(tmp_path_factory.mktemp("direction") / "r.safetensors", seed=1)


@pytest.fixture(scope="module")
def plain(repository: Path, direction: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion without a limit makes."""
    place = tmp_path_factory.mktemp("plain")
    with serving(MODEL, repository) as hub, pytest.MonkeyPatch.context() as patch:
        hub_client.use(hub, str(place / "home"), patch)
        conversion.convert(MODEL, place / "out", direction=direction, evaluate=False)
    return snapshot(place / "out")


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    with serving(MODEL, repository) as hub:
        hub_client.use(hub, str(tmp_path / "home"), monkeypatch)
        yield hub


def options(limit: int, memory: str = "auto") -> RunOptions:
    return RunOptions(cache_limit=limit, memory=memory)


def test_the_limit_holds_and_the_bytes_are_the_same(
    hub: Hub, direction: Path, plain: dict[str, bytes], tmp_path: Path
) -> None:
    limit = least(hub)
    assert limit < 0.5 * sum(shards(hub).values())
    with watched((tmp_path / "home", FETCHED)) as most:
        conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(limit), evaluate=False)
    assert snapshot(tmp_path / "out") == plain
    assert max(shards(hub).values()) <= most[0] <= limit
    assert not list((tmp_path / "home" / "abliterate").iterdir())
    assert not list((tmp_path / "home" / "hub").rglob("*.safetensors"))


def test_room_for_all_fetches_all_once(hub: Hub, direction: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    before = sum(shards(hub).values())
    conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(before), evaluate=False)
    assert snapshot(tmp_path / "out") == plain
    headers = sum(min(1 << 18, size) for size in shards(hub).values())
    assert sum(hub.sent[name] for name in shards(hub)) == before + headers


def test_calibrated_streamed_through_the_limit(hub: Hub, tmp_path: Path) -> None:
    recipe = tmp_path / "quick.yaml"
    recipe.write_text(QUICK)
    conversion.convert(hub.folder.as_posix(), tmp_path / "local", recipe=str(recipe), evaluate=False)
    with watched((tmp_path / "home", FETCHED)) as most:
        conversion.convert(
            MODEL, tmp_path / "out", recipe=str(recipe), options=options(least(hub), "streamed"), evaluate=False
        )
    one, two = snapshot(tmp_path / "local"), snapshot(tmp_path / "out")
    for name in ("README.md", "abliteration.json"):  # they name the model
        assert one.pop(name) != two.pop(name)
    assert one == two
    assert 0 < most[0] <= least(hub) and passes(hub) > 5


def test_layers_that_memory_keeps_are_fetched_once(hub: Hub, tmp_path: Path) -> None:
    recipe = tmp_path / "quick.yaml"
    recipe.write_text(QUICK)
    found = find.find_direction(MODEL, recipe=str(recipe), options=options(least(hub)))
    assert found.direction.shape == (pico.HIDDEN,)
    headers = sum(min(1 << 18, size) for size in shards(hub).values()) / sum(shards(hub).values())
    assert passes(hub) - headers < 1.5


def test_a_killed_run_goes_on_with_what_was_fetched(
    hub: Hub, direction: Path, plain: dict[str, bytes], tmp_path: Path
) -> None:
    names, blocks = [*shards(hub)], []
    limit = sum(shards(hub).values())
    words = ["convert", MODEL, str(tmp_path / "out"), "--direction", str(direction), "--no-evaluate", "-q"]
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "abliterate", *words, "--cache-limit", f"{limit}B"]
    running = subprocess.Popen(command, env=environment)

    def seen(name: str) -> None:
        if (tmp_path / "home/abliterate").exists() and name in names:
            blocks.append(name)
        if blocks.count(names[3]) == 10:  # its header was 4 of them
            wait_for(lambda: any(path.stat().st_size for path in (tmp_path / "home").rglob(f"{names[3]}.partial")))
            running.send_signal(signal.SIGKILL)
            running.wait(30)

    hub.seen = seen
    assert running.wait(120) == -signal.SIGKILL
    hub.seen = lambda _: None
    left = {path.name: path.stat().st_size for path in (tmp_path / "home").rglob("shards/*")}
    assert any(name.endswith(".partial") and size for name, size in left.items()), left
    whole = [name for name in left if not name.endswith(".partial")]
    hub.sent.clear()
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert snapshot(tmp_path / "out") == plain
    missing = limit - sum(left.values())  # connections of the run that was killed may have sent a block since
    assert missing <= sum(hub.sent[name] for name in names) <= missing + 4 * BLOCK
    assert whole and all(hub.sent[name] <= BLOCK for name in whole)


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not what() and time.monotonic() < until:
        time.sleep(0.01)


def moved(hub: Hub, place: Path) -> None:
    """Has the branch stand for another commit, with other weights."""
    shutil.copytree(hub.folder, place)
    pico.save(place, "llama", shards=6, seed=9, tokenizer=True, **SIZES)
    hub.commits[COMMIT], hub.commit, hub.folder = hub.folder, "f" * 40, place


def test_a_branch_that_moves_is_not_mixed(hub: Hub, direction: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    second, seen = [*shards(hub)][1], []

    def move(name: str) -> None:
        seen.append(name)
        if name == second and hub.commit == COMMIT and len(seen) > 40:
            moved(hub, tmp_path / "moved")

    hub.seen = move
    limit = least(hub)
    conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(limit), evaluate=False)
    assert hub.commit != COMMIT and snapshot(tmp_path / "out") == plain


def test_a_branch_that_moved_while_a_run_was_stopped_is_said(hub: Hub, direction: Path, tmp_path: Path) -> None:
    last, settings = [*shards(hub)][-1], options(least(hub))
    stop_at(hub, last)
    with pytest.raises(HubError):
        conversion.convert(MODEL, tmp_path / "out", direction=direction, options=settings, evaluate=False)
    hub.seen, hub.faults = lambda _: None, {}
    moved(hub, tmp_path / "moved")
    with pytest.raises(OutputError, match=r"another run .*base: commit"):
        conversion.convert(MODEL, tmp_path / "out", direction=direction, options=settings, evaluate=False)


def stop_at(hub: Hub, name: str, status: int = 404) -> None:
    """Has the Hub answer like that to requests for the file, once its header was read and others were fetched."""
    seen: list[str] = []

    def look(file: str) -> None:
        seen.append(file)
        if len(set(seen[-3:])) == 1 and file.startswith("model-") and len(seen) > 40:
            hub.faults.setdefault(name, [status] * 99)

    hub.seen = look


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_hub_that_fails_midway_costs_nothing(
    hub: Hub, direction: Path, plain: dict[str, bytes], tmp_path: Path, status: int
) -> None:
    last = [*shards(hub)][-1]
    stop_at(hub, last, status)
    with pytest.raises(HubError) as caught:
        conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(least(hub)), evaluate=False)
    assert MODEL in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    hub.seen, hub.faults = lambda _: None, {}
    hub.sent.clear()
    conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(least(hub)), evaluate=False)
    assert snapshot(tmp_path / "out") == plain and passes(hub) < 2


def test_a_hash_that_is_not_the_hubs_ends_the_run(hub: Hub, direction: Path, tmp_path: Path) -> None:
    name = [*shards(hub)][2]
    hub.altered.add(name)
    with pytest.raises(HubError, match=f"{name} of {MODEL} does not arrive with the hash"):
        conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(least(hub)), evaluate=False)
    assert not (tmp_path / "out").exists()


def test_a_limit_that_is_too_small_names_the_least_that_works(hub: Hub, direction: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--cache-limit 1000 is too little for org/pico: .* give") as caught:
        conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(1000), evaluate=False)
    needed = int(str(caught.value).split(": ")[1].split(" bytes")[0].replace(",", ""))
    assert max(shards(hub).values()) < needed <= least(hub)
    headers = sum(min(1 << 18, size) for size in shards(hub).values())
    assert sum(hub.sent[name] for name in shards(hub)) == headers
    with pytest.raises(CheckpointError, match="too little"):
        find.find_direction(MODEL, options=options(needed - 1, "streamed"))
    conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(needed), evaluate=False)


def test_what_would_be_fetched_is_said_first(
    hub: Hub, direction: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = RunOptions(cache_limit=least(hub), memory="streamed", max_new_tokens=8)
    would = dryrun.dry_run(MODEL, tmp_path / "out", options=settings)
    words = ("shards, at most", "will be fetched; every pass fetches", "--no-evaluate: answers of 8 tokens")
    assert all(text in would.summary for text in words), would.summary
    assert not (tmp_path / "home/abliterate").exists()
    far = RunOptions(cache_limit=least(hub), memory="streamed", max_new_tokens=200)
    with pytest.raises(CheckpointError, match=r"more than 100 times over.*--no-evaluate.*--max-new-tokens"):
        dryrun.dry_run(MODEL, tmp_path / "out", options=far)
    held = dryrun.dry_run(MODEL, tmp_path / "out", options=options(least(hub)))
    assert "every pass" not in held.summary
    conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(least(hub)), evaluate=False)
    said = [record.message for record in caplog.records if "will be fetched" in record.message]
    assert len(said) == 1 and said[0].startswith(MODEL)


def test_verified_on_demand(hub: Hub, direction: Path, tmp_path: Path) -> None:
    conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(least(hub)), evaluate=False)
    hub.folder = tmp_path / "out"
    hub.commit = "e" * 40
    with watched((tmp_path / "home", FETCHED)) as most:
        found = verification.verify(MODEL, options=options(least(hub)))
    assert found.holds and found.manifest and 0 < most[0] <= least(hub)
    data = bytearray((tmp_path / "out" / [*shards(hub)][1]).read_bytes())
    data[-2] ^= 1
    (tmp_path / "out" / [*shards(hub)][1]).write_bytes(data)
    hub.commit = "d" * 40
    assert verification.verify(MODEL, options=options(least(hub))).mismatches == ([*shards(hub)][1],)


def test_two_runs_of_a_model_do_not_share_a_shelf(hub: Hub, tmp_path: Path) -> None:
    words = "another run reads org/pico with --cache-limit"
    with located(MODEL, None, least(hub)), pytest.raises(CheckpointError, match=words), located(MODEL, None, 10**9):
        pass


def test_a_folder_has_no_limit(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    with located(str(repository), None, 1000) as source:
        assert source.keeper is None and source.folder == repository
    assert "changes nothing" in caplog.text


def test_offline_the_hubs_cache_is_all_there_is(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with located(MODEL):
        pass
    hub.sent.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with located(MODEL, None, 1000) as source:
        assert source.keeper is None and source.commit == COMMIT
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(AbliterateError, match="HF_HUB_OFFLINE is set"), located(MODEL, None, 1000):
        pass
    assert not hub.sent


def test_shards_in_the_hubs_cache_are_used_and_not_fetched(hub: Hub, direction: Path, tmp_path: Path) -> None:
    name = next(iter(shards(hub)))
    huggingface_hub.hf_hub_download(MODEL, name)
    hub.sent.clear()
    conversion.convert(MODEL, tmp_path / "out", direction=direction, options=options(least(hub)), evaluate=False)
    assert hub.sent[name] == min(1 << 18, shards(hub)[name])
    assert len(list((tmp_path / "home" / "hub").rglob(name))) == 1


def test_a_model_that_does_not_fit_is_not_begun(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    words = r"MB of org/pico have to be fetched, and 1.0 MB are free.*--cache-limit SIZE"
    with pytest.raises(CheckpointError, match=words), located(MODEL):
        pass
    assert not hub.sent
