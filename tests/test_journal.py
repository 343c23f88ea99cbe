"""What is finished is not done again; what is damaged, or was made from something else, is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from abliterate.checkpoint.rewrite import ShardRecord
from abliterate.checkpoint.workfolder import WorkFolder
from abliterate.errors import OutputError
from abliterate.journal import Journal, JournalError, read_journal
from abliterate.stages import NO_STAGES, Once

SHARD = ShardRecord("m.safetensors", "a" * 64, "b" * 64, 7, 2)


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    folder = WorkFolder.of(tmp_path / "out")
    folder.path.mkdir()
    folder.stages.mkdir()
    return folder


def again(work: WorkFolder) -> Journal:
    """What the next run reads."""
    found = read_journal(work)
    assert found is not None
    return found


def forbidden() -> Tensor:
    raise AssertionError("done again")


def test_a_finished_stage_is_not_done_again(work: WorkFolder) -> None:
    value = torch.randn(3, dtype=torch.float64)
    first = Journal(work, {"recipe": (1, 2)})
    assert not first.begun and torch.equal(first.stage("a mean", Tensor, lambda: value), value)
    second = again(work)
    assert second.begun and second.identity == {"recipe": [1, 2]}
    assert torch.equal(second.stage("a mean", Tensor, forbidden), value)
    assert second.stage("b", int, lambda: 3) == 3
    assert again(work).summary == "2 stages and 0 shards are done"


def test_nothing_is_written_before_something_is_finished(work: WorkFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        Journal(work, {}).stage("a", int, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not work.journal.exists() and read_journal(work) is None


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [flipped, Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 100)]
)
def test_a_damaged_stage_is_done_again(
    work: WorkFolder, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(work, {})
    journal.stage("a mean", Tensor, lambda: torch.ones(2))
    journal.stage("b", int, lambda: 2)
    damage(work.stages / "a-mean.safetensors")
    resumed = again(work)
    assert torch.equal(resumed.stage("a mean", Tensor, lambda: torch.ones(2)), torch.ones(2))
    assert "stage a mean is damaged" in caplog.text
    assert resumed.stage("b", int, forbidden) == 2, "the same came out, so what came after it is still good"
    assert torch.equal(again(work).stage("a mean", Tensor, forbidden), torch.ones(2))


def test_what_came_after_something_else_is_done_again(work: WorkFolder, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged stage may come out differently (on another device, say): nothing may be mixed then."""
    journal = Journal(work, {})
    journal.stage("a", int, lambda: 1)
    journal.stage("b", int, lambda: 2)
    journal.finish_shard(SHARD)
    flipped(work.stages / "a.safetensors")
    resumed = again(work)
    assert resumed.stage("a", int, lambda: 10) == 10
    assert resumed.stage("b", int, lambda: 20) == 20
    assert "stage b was made from something else" in caplog.text
    assert resumed.shards == {} and resumed.all_shards == {SHARD.name: SHARD}


def test_stages_within_a_stage(work: WorkFolder) -> None:
    """The rounds of a selection: kept while it goes on, and not asked for once it is done."""

    def selection(journal: Journal, last: Callable[[], int]) -> Callable[[], int]:
        return lambda: journal.stage("round 1", int, lambda: 1) + journal.stage("round 2", int, last)

    first = Journal(work, {})
    with pytest.raises(AssertionError):
        first.stage("selection", int, selection(first, forbidden))  # type: ignore[arg-type]
    second = again(work)
    assert second.stage("selection", int, selection(second, lambda: 2)) == 3
    third = again(work)
    assert third.stage("selection", int, forbidden) == 3
    third.stage("after", int, lambda: 4)
    fourth = again(work)
    fourth.stage("selection", int, forbidden)
    assert fourth.stage("after", int, forbidden) == 4


def test_another_type_is_not_taken_for_this_one(work: WorkFolder) -> None:
    Journal(work, {}).stage("a", int, lambda: 1)
    assert again(work).stage("a", str, lambda: "x") == "x"


def test_a_shard_counts_after_the_stages_it_was_made_after(work: WorkFolder) -> None:
    journal = Journal(work, {})
    journal.stage("a", int, lambda: 1)
    journal.finish_shard(SHARD)
    resumed = again(work)
    assert resumed.shards == {}
    resumed.stage("a", int, forbidden)
    assert resumed.shards == {SHARD.name: SHARD}
    resumed.drop_shard(SHARD.name)
    assert not again(work).all_shards


def test_what_depends_on_shards(work: WorkFolder) -> None:
    journal = Journal(work, {})
    journal.follow([SHARD])
    journal.stage("certificate", int, lambda: 1)
    same, other = again(work), again(work)
    same.follow([SHARD])
    assert same.stage("certificate", int, forbidden) == 1
    other.follow([ShardRecord(SHARD.name, SHARD.sha256_in, "c" * 64, 7, 2)])
    assert other.stage("certificate", int, lambda: 2) == 2


def test_without_hashes_nothing_that_depends_on_shards_is_found_again(work: WorkFolder) -> None:
    bare = ShardRecord("m.safetensors", None, None, 7, 2)
    journal = Journal(work, {})
    journal.follow([bare])
    journal.stage("certificate", int, lambda: 1)
    resumed = again(work)
    resumed.follow([bare])
    assert resumed.stage("certificate", int, lambda: 2) == 2


def test_two_stages_of_one_name(work: WorkFolder) -> None:
    journal = Journal(work, {})
    journal.stage("a", int, lambda: 1)
    with pytest.raises(ValueError, match="two stages are called a"):
        journal.stage("a", int, lambda: 1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"sha256": 1}', b'{"sha256": "0"}'])
def test_a_journal_that_is_none(work: WorkFolder, content: bytes) -> None:
    work.journal.write_bytes(content)
    with pytest.raises(JournalError):
        read_journal(work)


def test_a_bit_that_flips_in_the_journal(work: WorkFolder) -> None:
    journal = Journal(work, {"recipe": 1})
    journal.stage("a", int, lambda: 1)
    journal.finish_shard(SHARD)
    content = json.loads(work.journal.read_text())
    content["shards"][SHARD.name]["record"]["sha256_in"] = "c" * 64
    work.journal.write_text(json.dumps(content))
    with pytest.raises(JournalError, match="another"):
        read_journal(work)


def test_a_full_disk(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    journal = Journal(work, {})
    journal.stage("a", int, lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match="disk full"):
            journal.stage("b", int, lambda: 2)
    assert again(work).summary == "1 stages and 0 shards are done"


def test_keeping_nothing() -> None:
    assert NO_STAGES.stage("a", int, lambda: 1) == 1
    assert NO_STAGES.stage("a", int, lambda: 2) == 2


def test_something_costly_is_made_once() -> None:
    made: list[int] = []
    once = Once(lambda: made.append(1) or "x")
    assert once.made is None and made == []
    assert (once(), once(), once.made, made) == ("x", "x", "x", [1])
