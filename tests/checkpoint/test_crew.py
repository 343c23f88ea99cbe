"""Workers spread over shards, begin pieces in order, and one failure ends all."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from abliterate.checkpoint.crew import StoppedError, crew, each


@pytest.fixture(autouse=True)
def _two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)


def test_pieces_begin_in_their_order_and_all_are_done() -> None:
    begun: list[int] = []
    with crew() as workers:
        workers.run([lambda number=number: begun.append(number) for number in range(200)])  # type: ignore[misc]
    assert sorted(begun) == list(range(200))


def test_two_workers_are_at_two_shards() -> None:
    """While there is work in both, they hardly ever are at the same one."""
    at, lock = {"a": 0, "b": 0}, threading.Lock()
    apart = 0

    def piece(shard: str, other: str) -> Callable[[], None]:
        def work() -> None:
            nonlocal apart
            with lock:
                at[shard] += 1
                apart += at[other] > 0
            time.sleep(0.002)
            with lock:
                at[shard] -= 1

        return work

    with crew() as workers, ThreadPoolExecutor(2) as shards:
        list(shards.map(workers.run, ([piece(*names)] * 60 for names in (("a", "b"), ("b", "a")))))
    assert apart > 80


def test_one_shard_has_all_workers() -> None:
    met = threading.Barrier(2, timeout=20)
    with crew() as workers:
        workers.run([lambda: met.wait() and None] * 2)


def test_the_first_error_ends_all_work_and_is_what_is_raised() -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("broken")

    def make(number: int) -> int:
        pieces: list[Callable[[], None]] = [lambda: time.sleep(0.001)] * 500
        workers.run([*pieces, *([fail] if number == 1 else []), lambda: done.append(number)])
        return number

    with pytest.raises(ValueError, match="broken"), crew() as workers:
        list(each(workers, 2, make, (0, 1)))
    assert 1 not in done
    with pytest.raises(StoppedError):
        workers.check()


def test_after_an_error_nothing_more_is_begun() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with crew() as workers:
        with pytest.raises(KeyboardInterrupt):
            workers.run([fail])
        begun: list[int] = []
        with pytest.raises(StoppedError):
            workers.run([lambda: begun.append(1)])
    assert not begun


def test_no_thread_is_left() -> None:
    with crew() as workers:
        workers.run([lambda: None])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rewrite ")]


def test_a_buffer_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    places: list[int] = []
    with crew() as workers:
        workers.run([lambda size=size: places.append(workers.buffer(size).data_ptr()) for size in (20, 10, 20)])  # type: ignore[misc]
        workers.run([lambda: places.append(len(workers.buffer(40)))])
    assert places[:3] == places[:1] * 3 and places[3] == 40
