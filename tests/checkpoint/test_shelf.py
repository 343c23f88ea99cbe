"""The shelf keeps its limit whatever is asked of it, and never takes away what is being read."""

import hashlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from abliterate.checkpoint.crew import StoppedError
from abliterate.checkpoint.download import is_right
from abliterate.checkpoint.keeper import Check
from abliterate.checkpoint.remote import RemoteFile
from abliterate.checkpoint.shelf import Shard, Shelf
from abliterate.errors import CheckpointError, HubError
from abliterate.progress import Progress

SIZES = (100, 70, 130, 90, 110)


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZES[number])


def shard(number: int) -> Shard:
    data = content(number)
    return Shard(RemoteFile(f"{number}.safetensors", len(data), hashlib.sha256(data).hexdigest(), None), data[:8])


SHARDS = tuple(map(shard, range(len(SIZES))))
NAMES = tuple(each.file.name for each in SHARDS)


class Source:
    """Brings shards byte by byte or so, and looks at the folder while it does."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause, self.fetched, self.most = pause, list[str](), 0
        self.error: Exception | None = None

    def __call__(self, file: RemoteFile, partial: Path, final: Path, progress: Progress, check: Check) -> int:
        if self.error is not None:
            raise self.error
        self.fetched.append(file.name)
        data = content(NAMES.index(file.name))
        with partial.open("wb") as out:
            for start in range(0, len(data), 10):
                check()
                out.write(data[start : start + 10])
                out.flush()
                self.look(partial.parent)
                time.sleep(self.pause)
        partial.rename(final)
        return len(data)

    def look(self, folder: Path) -> None:
        sizes = []
        for path in folder.iterdir():
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                sizes.append(0)
        self.most = max(self.most, sum(sizes))


def shelf(folder: Path, source: Source, limit: int, **more: dict[str, Path]) -> Shelf:
    return Shelf(folder / "shards", SHARDS, limit, source, is_right, **more)


def test_passes_fetch_what_has_no_room(tmp_path: Path) -> None:
    source = Source()
    keeper = shelf(tmp_path, source, 310)
    for _ in range(3):
        for number, name in enumerate(NAMES):
            with keeper.hold([name]) as places:
                assert places[name].read_bytes() == content(number)
    assert source.fetched[:5] == [*NAMES] and len(source.fetched) < 15
    assert source.most <= 310 and keeper.fetched == sum(SIZES[NAMES.index(name)] for name in source.fetched)


def test_threads_share_the_room(tmp_path: Path) -> None:
    source, chance = Source(0.0005), random.Random(0)
    keeper = shelf(tmp_path, source, 240)

    def read(number: int) -> None:
        with keeper.hold([NAMES[number]]) as places:
            for _ in range(5):
                assert places[NAMES[number]].read_bytes() == content(number)
                source.look(tmp_path / "shards")
                time.sleep(0.0005)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, chance.choices(range(5), k=60)))
    assert 130 <= source.most <= 240
    assert sum(path.stat().st_size for path in (tmp_path / "shards").iterdir()) <= 240


def test_two_that_want_the_same_shard_fetch_it_once(tmp_path: Path) -> None:
    source = Source(0.002)
    keeper = shelf(tmp_path, source, 130)

    def read(_: int) -> bytes:
        with keeper.hold([NAMES[2]]) as places:
            return places[NAMES[2]].read_bytes()

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(read, range(8))) == {content(2)}
    assert source.fetched == [NAMES[2]]


def test_too_little_room_is_said_and_not_waited_for(tmp_path: Path) -> None:
    keeper = shelf(tmp_path, Source(), 200)
    words = "230 bytes of shards are needed at once; give 230B or more"
    with pytest.raises(CheckpointError, match=words), keeper.hold([NAMES[0], NAMES[2]]):
        pass
    with keeper.hold([NAMES[0]]), pytest.raises(CheckpointError, match="230 bytes"), keeper.hold([NAMES[2]]):
        pass
    with keeper.hold([NAMES[2], NAMES[1]]) as places:
        assert len(places) == 2


def test_two_that_wait_for_one_another_are_told(tmp_path: Path) -> None:
    keeper, both = shelf(tmp_path, Source(), 200), threading.Barrier(2)

    def take(first: int, second: int) -> str:
        with keeper.hold([NAMES[first]]):
            both.wait(5)
            try:
                with keeper.hold([NAMES[second]]):
                    return "had both"
            except CheckpointError as error:
                return str(error)

    with ThreadPoolExecutor(2) as threads:
        said = [*threads.map(take, (0, 1), (2, 3))]
    assert any("needed at once" in words for words in said)


def test_what_a_run_left_is_looked_at_before_it_is_used(tmp_path: Path) -> None:
    with shelf(tmp_path, Source(), 400).hold(NAMES[:2]):
        pass
    folder = tmp_path / "shards"
    (folder / NAMES[0]).write_bytes(bytes(SIZES[0]))
    (folder / "old.safetensors").write_bytes(b"x")
    source = Source()
    with shelf(tmp_path, source, 400).hold(NAMES[:2]) as places:
        assert [places[name].read_bytes() for name in NAMES[:2]] == [content(0), content(1)]
    assert source.fetched == [NAMES[0]] and sorted(path.name for path in folder.iterdir()) == [*NAMES[:2]]


def test_a_smaller_limit_than_before_is_kept_from_the_start(tmp_path: Path) -> None:
    with shelf(tmp_path, Source(), 500).hold(NAMES):
        pass
    (tmp_path / "shards" / f"{NAMES[4]}.partial").write_bytes(bytes(50))
    shelf(tmp_path, Source(), 180)
    assert sum(path.stat().st_size for path in (tmp_path / "shards").iterdir()) <= 180
    assert (tmp_path / "shards" / NAMES[0]).exists()


def test_shards_of_the_hubs_own_cache_stay_where_they_are(tmp_path: Path) -> None:
    cached = tmp_path / "cached"
    cached.write_bytes(content(2))
    source = Source()
    keeper = shelf(tmp_path, source, 100, elsewhere={NAMES[2]: cached})
    with keeper.hold([NAMES[0], NAMES[2]]) as places:
        assert places[NAMES[2]] == cached and source.fetched == [NAMES[0]]
    assert keeper.size(NAMES[2]) == 0
    cached.write_bytes(bytes(SIZES[2]))
    again = shelf(tmp_path, source, 100, elsewhere={NAMES[2]: cached})
    with pytest.raises(CheckpointError, match="is not what the Hub has: remove it"), again.hold([NAMES[2]]):
        pass
    assert cached.exists()


def test_a_header_that_is_not_the_one_that_was_read_first(tmp_path: Path) -> None:
    wrong = (Shard(SHARDS[0].file, b"x" * 8), *SHARDS[1:])
    keeper = Shelf(tmp_path / "shards", wrong, 400, Source(), is_right)
    with pytest.raises(CheckpointError, match="another header"), keeper.hold([NAMES[0]]):
        pass


def test_after_an_error_the_room_is_free_again(tmp_path: Path) -> None:
    source = Source()
    source.error = HubError("no")
    keeper = shelf(tmp_path, source, 130)
    with pytest.raises(HubError), keeper.hold([NAMES[0]]):
        pass
    source.error = None
    with keeper.hold([NAMES[2]]) as places:
        assert places[NAMES[2]].read_bytes() == content(2)


def test_who_fetches_when_the_shelf_is_closed_stops(tmp_path: Path) -> None:
    source = Source(0.02)
    keeper = shelf(tmp_path, source, 130)
    threading.Timer(0.05, keeper.close).start()
    with pytest.raises(StoppedError), keeper.hold([NAMES[2]]):
        pass
    assert not (tmp_path / "shards" / NAMES[2]).exists()
