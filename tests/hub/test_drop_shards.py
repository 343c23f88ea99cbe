"""`convert --drop-shards`: neither the base nor the result is ever whole here, and the result is the same."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from abliterate import conversion
from abliterate.checkpoint import diskio, patience, rewrite
from abliterate.checkpoint.output import Staging
from abliterate.edit import projections
from abliterate.errors import HubError
from abliterate.hub.ferry import Ferry
from abliterate.hub.upload import Upload
from abliterate.hub.workbranch import PREFIX, WorkBranch
from tests import hub_client, pico
from tests.commandline import Ran, names, run_here, snapshot
from tests.hub_store import Blob, Fault, Store
from tests.hub_uploads import uploads
from tests.hub_watch import FETCHED, watched

MODEL, NAME = "org/base", "org/name"
LIMIT = 150_000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pico.save(tmp_path_factory.mktemp("drop") / "base", "llama", shards=5, tied=True, tokenizer=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    pico.direction_file(folder / "extra" / "other.safetensors", 7)
    for seed in (1, 2):
        pico.direction_file(folder.parent / f"r{seed}.safetensors", seed=seed)
    return folder


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion makes that keeps its shards."""
    place = tmp_path_factory.mktemp("plain")
    with uploads() as store, pytest.MonkeyPatch.context() as patch:
        hub_client.use(store, str(place / "home"), patch)
        store.serve(MODEL, base)
        direction = base.parent / "r1.safetensors"
        conversion.convert(MODEL, place / "out", direction=direction, evaluate=False)
    return snapshot(place / "out")


@pytest.fixture
def store(hub: Store, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The Hub with the base on it."""
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    hub_client.use(hub, str(tmp_path / "home"), monkeypatch)
    hub.serve(MODEL, base)
    return hub


@pytest.fixture
def words(base: Path, tmp_path: Path) -> list[str]:
    given = ["--direction", str(base.parent / "r1.safetensors"), "--no-evaluate", "--push-to", NAME, "-q"]
    return ["convert", MODEL, str(tmp_path / "out"), *given, "--drop-shards", "--cache-limit", f"{LIMIT}B"]


def shards(content: dict[str, bytes]) -> set[str]:
    return {name for name in content if name.startswith("model-") and name.endswith(".safetensors")}


def finished(ran: Ran, store: Store, plain: dict[str, bytes], tmp_path: Path) -> None:
    """The result is whole on the Hub, in one commit, every file sent once; here it is without its shards."""
    assert ran.code == 0, ran
    assert store.complete(NAME, plain)
    repository = store.repositories[NAME]
    assert len(repository.log) == 1 and set(repository.branches) == {"main"}
    assert set(store.stored.values()) == {1}
    here = snapshot(tmp_path / "out")
    note = json.loads(here.pop(".cache/abliterate/weights.json"))
    assert note == {"weights": f"{NAME}@{repository.branches['main']}"}
    assert here == {name: content for name, content in plain.items() if name not in shards(plain)}
    assert set(names(tmp_path)) <= {"home", "out"} and not list((tmp_path / "home/abliterate").glob("*"))


def told(ran: Ran, *said: str) -> None:
    """It failed with one line that says this."""
    lines = [line for line in re.split(r"[\r\n]+", ran.err) if line and not line.startswith("Fetching ")]
    assert ran.code == 1 and len(lines) == 1 and all(text in lines[0] for text in said), ran


def places(at: Path) -> tuple[tuple[Path, str], ...]:
    """Where shards lie: of the base, of the result as it is written, and as it is read back."""
    work = at / ".out.abliterate-work"
    written = [(work / "out", form) for form in ("model-*.safetensors", ".model-*.safetensors.partial")]
    return (at / "home", FETCHED), (work / "hub", FETCHED.partition("/")[2]), *written


def test_within_the_least_limit_that_works(
    words: list[str], store: Store, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = run_here(*words[:-1], "1000B")
    told(small, "--cache-limit 1000 is too little for org/base")
    found = re.search(r"([\d,]+) bytes of shards", small.err)
    assert found and not list(store.stored)
    limit = int(found[1].replace(",", ""))
    assert limit < 0.6 * sum(len(plain[name]) for name in shards(plain))
    told(run_here(*words[:-1], f"{limit - 1}B"), "is too little for org/base")
    monkeypatch.setattr(store, "slow", 0.002)  # so that shards wait to be sent
    with watched(*places(tmp_path)) as most:
        ran = run_here(*words[:-1], f"{limit}B")
    finished(ran, store, plain, tmp_path)
    assert max(len(plain[name]) for name in shards(plain)) < most[0] <= limit


def test_the_folder_knows_where_its_weights_are(words: list[str], store: Store, tmp_path: Path) -> None:
    ran = run_here(*(word for word in words if word != "-q"))
    place = f"{NAME}@{store.repositories[NAME].branches['main']}"
    assert f"holds everything but the weights; they are on the Hub as {place}" in " ".join(ran.out.split())
    assert ran.out.splitlines()[-1] == f"{store.url}/{NAME}"
    out = str(tmp_path / "out")
    for command in (("verify", out), ("inspect", out), ("push", out, "org/other"), ("plan", out)):
        told(run_here(*command), f"out holds no weights: they are on the Hub as {place}")
    assert run_here("verify", place, "-q", "--cache-limit", f"{LIMIT}B").code == 0
    for path in shards(snapshot(Path(store_folder(store, tmp_path)))):
        shutil.copy(tmp_path / "pulled" / path, out)
    assert run_here("verify", out, "-q").code == 0


def store_folder(store: Store, tmp_path: Path) -> Path:
    """What is on the Hub, as files."""
    for name, blob in store.repositories[NAME].files().items():
        path = tmp_path / "pulled" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob.content)
    return tmp_path / "pulled"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are written."""
    seen, real = [], rewrite.write_shard

    def write(job: Any, final: Path, workers: Any) -> Any:
        seen.append(final.name)
        return real(job, final, workers)

    monkeypatch.setattr(rewrite, "write_shard", write)
    return seen


STEPS: list[tuple[type, str, int]] = [
    (WorkBranch, "send", 2),
    (WorkBranch, "add", 1),
    (WorkBranch, "add", 2),
    (Ferry, "_drop", 1),
    (WorkBranch, "complete", 1),
    (Ferry, "deliver", 1),
    (Upload, "_committed", 1),
    (WorkBranch, "remove", 1),
    (Staging, "publish", 1),
]
"""What a run goes through once its first shard is written; each is left out, or done and then broken off."""


def broken(real: Callable[..., Any], count: int, after: bool) -> Callable[..., Any]:
    """The same, but the call of that number ends with an error, before it does anything or after it has done it all."""
    calls = []

    def call(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == count and not after:
            raise HubError("cut")
        made = real(*given)
        if len(calls) == count:
            raise HubError("cut")
        return made

    return call


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_at_every_step(
    words: list[str], store: Store, plain: dict[str, bytes], tmp_path: Path, written: list[str], after: bool
) -> None:
    """One conversion, stopped at one step after the other; each run goes on from where the last one was stopped."""
    before = 0
    for place, step, count in STEPS[:-1] if after else STEPS:  # what is published is done
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, step, broken(getattr(place, step), count, after))
            ran = run_here(*words)
        told(ran, "error: cut")
        done = store.repositories[NAME].log
        assert not store.half_made(NAME, plain) and len(done) <= 1, (place, step)
        before = len(written) if step == "complete" else before
    finished(run_here(*words), store, plain, tmp_path)
    assert len(written) == before >= 6


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("POST .*/branch/", 403), "may not write to org/name (403)"),
        (Fault(f"/commit/{PREFIX}", 409, after=2), "another change to org/name is under way (409)"),
        (Fault(f"/commit/{PREFIX}", 500, times=-1, after=1), "the Hub failed (500)"),
        (Fault("PUT /lfs/", cut=5_000, times=-1, after=3), "broke"),
        (Fault(f"GET /{NAME}/resolve/.*/model-00003", 502, times=-1, after=1), "cannot be fetched from the Hub"),
        (Fault("/commit/main", 401), "does not take the token (401)"),
    ],
)
def test_a_hub_that_fails_costs_no_work(
    words: list[str],
    store: Store,
    plain: dict[str, bytes],
    tmp_path: Path,
    naps: list[float],
    fault: Fault,
    said: str,
) -> None:
    store.faults = [fault]
    told(run_here(*words), said)
    assert store.repositories[NAME].log == [] and not (tmp_path / "out").exists()
    store.faults = []
    finished(run_here(*words), store, plain, tmp_path)


@pytest.mark.usefixtures("naps")
def test_an_answer_that_is_lost(words: list[str], store: Store, plain: dict[str, bytes], tmp_path: Path) -> None:
    store.faults = [Fault(f"/commit/{PREFIX}", late=True, after=1), Fault("/commit/main", late=True)]
    finished(run_here(*words), store, plain, tmp_path)


def test_a_branch_that_cannot_be_removed_is_told(
    words: list[str], store: Store, plain: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store.faults = [Fault("DELETE ", 403)]
    with caplog.at_level("WARNING", "abliterate"):
        assert run_here(*(word for word in words if word != "-q")).code == 0
    assert store.complete(NAME, plain) and "hf repos branch delete org/name abliterate-work-" in caplog.text


def stopped_once_sent(words: list[str], store: Store) -> str:
    """A run that ends when all shards are on the work branch; the name of that."""
    store.faults = [Fault("/commit/main", 403)]
    assert run_here(*words).code == 1
    store.faults = []
    (name,) = set(store.repositories[NAME].branches) - {"main"}
    return name


def change(store: Store, branch: str) -> None:
    """Somebody commits another shard to the work branch, of the same size."""
    repository = store.repositories[NAME]
    files, name = dict(repository.files(branch)), "model-00002-of-00006.safetensors"
    content = bytearray(files[name].content)
    content[-1] ^= 1
    repository.commit(branch, {**files, name: Blob(bytes(content), True)})


def remove(store: Store, branch: str) -> None:
    del store.repositories[NAME].branches[branch]


@pytest.mark.parametrize(("meddle", "again"), [(change, 1), (remove, 6)])
def test_only_what_has_the_hash_that_was_written_down_is_used(
    words: list[str],
    store: Store,
    plain: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    written: list[str],
    meddle: Callable[[Store, str], None],
    again: int,
) -> None:
    branch = stopped_once_sent(words, store)
    meddle(store, branch)
    written.clear()
    ran = run_here(*(word for word in words if word != "-q"))
    assert caplog.text.count(f"is not on {NAME}@{branch}: it is written again") == again == len(written)
    finished(ran, store, plain, tmp_path)


def test_a_branch_that_goes_while_shards_are_sent(
    words: list[str], store: Store, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, added = WorkBranch.add, []

    def add(branch: WorkBranch, item: Any) -> None:
        added.append(item)
        if len(added) == 3:
            remove(store, branch.name)
        real(branch, item)

    with monkeypatch.context() as patch:
        patch.setattr(WorkBranch, "add", add)
        told(run_here(*words), f"org/name@{PREFIX}", "was removed while shards were sent to it")
    finished(run_here(*words), store, plain, tmp_path)


def test_another_run_has_another_branch(
    words: list[str], store: Store, plain: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = [word.replace("r1.safetensors", "r2.safetensors") for word in words]
    branch = stopped_once_sent(other, store)
    told(run_here(*words), "holds unfinished work of another run", "--overwrite")
    ran = run_here(*(word for word in words if word != "-q"), "--overwrite")
    assert ran.code == 0 and f"`hf repos branch delete {NAME} {branch}`" in caplog.text
    assert store.complete(NAME, plain) and set(store.repositories[NAME].branches) == {"main", branch}


def test_a_certificate_that_fails_commits_nothing(
    words: list[str], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(projections.LocalProjection, "apply", lambda self, rows, block: block.clone())
    ran = run_here(*(word for word in words if word != "-q"))
    assert ran.code == 1 and "certificate failed" in ran.err and names(tmp_path) == ["home", "out.failed"]
    (branch,) = set(store.repositories[NAME].branches) - {"main"}
    assert store.repositories[NAME].log == [] and f"`hf repos branch delete {NAME} {branch}`" in caplog.text
    place = f"{NAME}@{store.repositories[NAME].branches[branch]}"
    told(run_here("inspect", str(tmp_path / "out.failed")), f"they are on the Hub as {place}")


def test_what_the_repository_held_before_is_replaced(
    words: list[str], store: Store, plain: dict[str, bytes], base: Path
) -> None:
    old = store.serve(NAME, base)
    old.private = True
    notes = Blob(b"mine", False)
    old.commit("main", {**old.files(), "notes.txt": notes, "model-00001-of-00002.safetensors": Blob(b"old", True)})
    assert run_here(*words).code == 0
    found = {name: blob.content for name, blob in store.repositories[NAME].files().items()}
    assert found == {**plain, "notes.txt": b"mine"} and set(old.branches) == {"main"}


def test_another_branch_than_main(
    words: list[str], store: Store, plain: dict[str, bytes], written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once the work branch is gone, a run finds all on the branch that it has pushed to."""
    there = [f"{NAME}@dev" if word == NAME else word for word in words]
    with monkeypatch.context() as patch:
        patch.setattr(WorkBranch, "remove", broken(WorkBranch.remove, 1, after=True))
        told(run_here(*there), "error: cut")
    assert set(store.repositories[NAME].branches) == {"main", "dev"}
    written.clear()
    assert run_here(*there).code == 0 and not written
    assert store.complete(NAME, plain, "dev") and store.complete(NAME, {})
    assert set(store.repositories[NAME].branches) == {"main", "dev"} and set(store.stored.values()) == {1}


def test_a_base_that_is_here(words: list[str], store: Store, base: Path, tmp_path: Path) -> None:
    here = [str(base) if word == MODEL else word for word in words]
    with watched(*places(tmp_path)) as most:
        ran = run_here(*here)
    found = {name: blob.content for name, blob in store.repositories[NAME].files().items()}
    assert ran.code == 0 and 0 < most[0] <= LIMIT and len(shards(found)) == 6
    assert not shards(snapshot(tmp_path / "out"))


def test_a_dry_run_says_it(words: list[str], store: Store, tmp_path: Path) -> None:
    ran = run_here(*words, "--dry-run")
    assert ran.code == 0 and "sent to the Hub and not kept" in ran.out and "of the result will be fetched" in ran.out
    assert NAME not in store.repositories and names(tmp_path) == ["home"]


def test_only_the_limit_has_to_be_free(
    words: list[str], store: Store, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(count: int) -> None:
        monkeypatch.setattr(diskio.shutil, "disk_usage", lambda _: SimpleNamespace(free=count))

    free(LIMIT)
    assert run_here(*words, "--dry-run").code == 0
    told(run_here(*(word for word in words if word != "--drop-shards"), "--dry-run"), "disk full", "150,000 are free")
    free(LIMIT - 1)
    told(run_here(*words, "--dry-run"), f"disk full: {LIMIT:,} bytes are needed")
    told(run_here(*words), f"disk full: {LIMIT:,} bytes are needed")
    free(LIMIT)
    assert run_here(*words).code == 0


@pytest.mark.parametrize(
    ("left_out", "more", "said"),
    [
        ("--push-to", (), "--drop-shards needs --push-to"),
        ("--cache-limit", (), "--drop-shards needs --cache-limit"),
        ("", ("--no-hash",), "--drop-shards knows shards again by the hashes that --no-hash leaves out"),
        ("", ("--adapter", "peft"), "--push-to does not go with --adapter"),
    ],
)
def test_what_makes_no_sense_is_usage(
    words: list[str], store: Store, left_out: str, more: tuple[str, ...], said: str
) -> None:
    at = words.index(left_out) if left_out else len(words)
    ran = run_here(*words[:at], *words[at + 2 :], *more)
    assert ran.code == 2 and said in ran.err and store.seen == []
