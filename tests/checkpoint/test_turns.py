"""Which shard goes first: what a pass then fetches, counted, and held against every other choice."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.checkpoint.turns import going_first, least, traffic


def lru(visits: list[int], room: int) -> int:
    """Fetches of the last pass where the least recently used goes first."""
    held: list[int] = []
    fetched = 0
    for _ in range(5):
        fetched = 0
        for number in visits:
            if number in held:
                held.remove(number)
            else:
                fetched += 1
                held = held[-(room - 1) :] if room > 1 else []
            held.append(number)
    return fetched


@pytest.mark.parametrize(("count", "room"), [(7, 1), (7, 2), (7, 4), (7, 6), (7, 7), (30, 15)])
def test_a_pass_fetches_little_more_than_what_has_no_room(count: int, room: int) -> None:
    visits = [{number} for number in range(count)]
    first, again = traffic(visits, [10] * count, 10 * room)
    assert (first, again) == (10 * count, 10 * count * (count - room) // (count - 1))
    assert lru([*range(count)], room) == (0 if room == count else count)


def fewest(count: int, room: int, passes: int) -> int:
    """Fetches of so many passes where every choice is the best."""
    steps = [*range(count)] * passes

    @cache
    def best(step: int, held: frozenset[int]) -> int:
        if step == len(steps):
            return 0
        if steps[step] in held:
            return best(step + 1, held)
        if len(held) < room:
            return 1 + best(step + 1, held | {steps[step]})
        return 1 + min(best(step + 1, held - {gone} | {steps[step]}) for gone in held)

    return best(0, frozenset())


@pytest.mark.parametrize(("count", "room"), [(3, 2), (4, 2), (4, 3), (5, 3)])
def test_no_choice_fetches_less(count: int, room: int) -> None:
    visits = [{number} for number in range(count)]
    for passes in (1, 2, 3):
        held, fetched = frozenset[int](), 0
        for number in [*range(count)] * passes:
            if number not in held:
                fetched += 1
                if len(held) == room:
                    held -= {going_first(held, number, count)[0]}
                held |= {number}
        assert fetched == fewest(count, room, passes)
    assert traffic(visits, [1] * count, room)[0] == count


@given(
    st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=8), st.lists(st.integers(1, 9), min_size=5)
)
def test_what_every_step_needs_has_room(visits: list[set[int]], sizes: list[int]) -> None:
    sizes = sizes[:5]
    room = least(visits, sizes)
    assert room == max(sum(sizes[number] for number in visit) for visit in visits)
    used = {number for visit in visits for number in visit}
    once = sum(sizes[number] for number in used)
    first, again = traffic(visits, sizes, room)
    assert first >= once and again <= first + once
    assert traffic(visits, sizes, sum(sizes)) == (once, 0)
