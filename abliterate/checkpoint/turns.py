"""Which shard goes first where not all have room, and what passes through a checkpoint then fetch.

Every pass reads the shards in the same order, again and again. Of such a cycle the shard that was used last is the one
whose next turn is farthest away, and so it goes first (L. Belady 1966, "A study of replacement algorithms for a
virtual-storage computer"): of n equal shards of which k > 1 have room, a pass fetches n(n - k)/(n - 1) on average.
To drop the least recently used would cost n, whatever k < n: that one is always the next to be needed.
"""

from collections.abc import Collection, Iterable, Sequence

Visits = Sequence[Collection[int]]
"""Numbers of the shards that each step of a pass needs at once."""


def going_first(there: Iterable[int], wanted: int, count: int) -> list[int]:
    """Shards in the order in which they go, where number `wanted` of `count` is to come."""
    return sorted(there, key=lambda number: (number - wanted) % count, reverse=True)


def side_by_side(sizes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers for the shards of several checkpoints: one cycle of all, for passes that read them in step.

    A shard comes where it begins in its own checkpoint, as a part of that.

    Args:
        sizes: of each checkpoint's shards, in bytes.
    """
    begins = [
        (sum(own[:number]) / (sum(own) or 1), member, number)
        for member, own in enumerate(sizes)
        for number in range(len(own))
    ]
    found = [[0] * len(own) for own in sizes]
    for turn, (_, member, number) in enumerate(sorted(begins)):
        found[member][number] = turn
    return found


def least(visits: Visits, sizes: Sequence[int]) -> int:
    """Bytes of the step that needs most at once."""
    return max((sum(sizes[number] for number in set(visit)) for visit in visits), default=0)


def traffic(visits: Visits, sizes: Sequence[int], limit: int) -> tuple[int, int]:
    """Bytes that the first pass fetches, and what every further one does on average.

    Args:
        visits: of one pass. `limit`: bytes that have room, at least `least` of them.
    """
    held: dict[int, int] = {}
    fetched = []
    for _ in range(max(2, len(sizes))):
        fetched.append(sum(_step(sorted(set(visit)), sizes, limit, held) for visit in visits))
    return fetched[0], sum(fetched[1:]) // len(fetched[1:])


def _step(visit: Sequence[int], sizes: Sequence[int], limit: int, held: dict[int, int]) -> int:
    if not visit:
        return 0
    missing = [number for number in visit if number not in held]
    needed = sum(sizes[number] for number in missing)
    for number in going_first(held.keys() - set(visit), visit[0], len(sizes)) if missing else ():
        if sum(held.values()) + needed <= limit:
            break
        del held[number]
    held.update({number: sizes[number] for number in missing})
    return needed
