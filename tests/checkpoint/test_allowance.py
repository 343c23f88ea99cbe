"""One limit for shards that are read and shards that are written: kept, shared, and never waited for in vain."""

import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from abliterate.checkpoint.allowance import Allowance
from abliterate.checkpoint.berths import Berths
from abliterate.checkpoint.elsewhere import NOTE, weights_at, write_note
from abliterate.checkpoint.header import Header
from abliterate.checkpoint.keeper import go_on
from abliterate.errors import CheckpointError, HubError


class Shelf:
    """An owner that drops in the order of names."""

    def __init__(self) -> None:
        self.dropped: list[str] = []

    def going_first(self, idle: Collection[str], wanted: Collection[str]) -> Sequence[str]:
        return sorted(idle)

    def drop(self, name: str) -> None:
        self.dropped.append(name)


def header(name: str) -> Header:
    return Header(Path(f"{name}.safetensors"), b"", {}, {}, 0, 0)


def berth(berths: Berths, name: str, size: int) -> None:
    with berths.at(header(name), size, go_on):
        pass


def test_who_wants_nothing_now_gives_way_first() -> None:
    allowance, mine, other = Allowance(100), Shelf(), Shelf()
    for thing, size in (((mine, "a"), 30), ((mine, "b"), 30), ((other, "c"), 30)):
        allowance.take({thing: size}, go_on)
        allowance.let_go([thing])
    allowance.take({(mine, "d"): 50}, go_on)
    assert other.dropped == ["c"] and mine.dropped == ["a"]
    assert allowance.taken == 80 == allowance.of(mine)


def test_what_is_held_stays() -> None:
    allowance, shelf = Allowance(100), Shelf()
    allowance.take({(shelf, "a"): 60}, go_on)
    with pytest.raises(CheckpointError, match="--cache-limit 100 is too little: 110 bytes"):
        allowance.take({(shelf, "b"): 50}, go_on)
    assert not shelf.dropped and allowance.taken == 60


def test_a_berth_is_kept_until_the_shard_is_gone() -> None:
    berths = Berths(Allowance(100), go_on)
    berth(berths, "a", 60)
    with pytest.raises(CheckpointError, match="too little"):
        berth(berths, "b", 60)
    berths.leave("a.safetensors")
    waiting = threading.Thread(target=berth, args=(berths, "b", 60), daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    berths.free("a.safetensors")
    waiting.join(5)
    assert not waiting.is_alive()


def test_a_shard_that_is_not_written_needs_no_berth() -> None:
    allowance = Allowance(100)
    berths = Berths(allowance, go_on)
    with pytest.raises(KeyError), berths.at(header("a"), 60, go_on):
        raise KeyError
    assert allowance.taken == 0
    berth(berths, "b", 100)


def test_nobody_waits_for_one_who_has_given_up() -> None:
    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise HubError("the Hub is gone")

    berths, caught = Berths(Allowance(100), check), []

    def wait() -> None:
        with pytest.raises(HubError, match="the Hub is gone") as error:
            berth(berths, "b", 60)
        caught.append(error)

    berth(berths, "a", 60)
    berths.leave("a.safetensors")
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    stopped.set()
    waiting.join(5)
    assert caught


def test_what_an_earlier_run_left_counts(tmp_path: Path) -> None:
    allowance = Allowance(100)
    berths = Berths(allowance, go_on)
    (tmp_path / "a.safetensors").write_bytes(b"a" * 70)
    berths.find(tmp_path)
    assert allowance.taken == 70
    with pytest.raises(CheckpointError, match="too little"):
        berth(berths, "b", 60)
    (tmp_path / "a.safetensors").unlink()
    berths.find(tmp_path)
    berth(berths, "b", 60)


def test_a_folder_says_where_its_weights_are(tmp_path: Path) -> None:
    assert weights_at(tmp_path) is None
    write_note(tmp_path, "org/name", "a" * 40)
    assert weights_at(tmp_path) == f"org/name@{'a' * 40}"
    for content in ("", "[]", "{}", '{"weights": 1}', '{"weights": "org/name@main"}', '{"weights": "a/b@\\u001b[2J"}'):
        (tmp_path / NOTE).write_text(content)
        assert weights_at(tmp_path) is None
    (tmp_path / NOTE).unlink()
    (tmp_path / NOTE).mkdir()
    assert weights_at(tmp_path) is None
