"""The output folder: there when it is whole, and otherwise as if nothing had happened, kills included."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from picocheckpoint import snapshot

from abliterate.checkpoint import output
from abliterate.checkpoint.output import Staging, check_target, staged
from abliterate.checkpoint.workfolder import WorkFolder
from abliterate.errors import OutputError

WORK_NAME = ".out.abliterate-work"
OLD, NEW = {"config.json": b"old"}, {"config.json": b"new", "sub/code.py": b"new"}


def fill(folder: Path, files: dict[str, bytes] = NEW) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def staging_for(out: Path, overwrite: bool = False) -> AbstractContextManager[Staging]:
    return staged(out, overwrite=overwrite, inputs=[])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_out_appears_when_it_is_published(tmp_path: Path) -> None:
    with staging_for(tmp_path / "out") as staging:
        assert staging.folder == tmp_path / WORK_NAME / "out"
        fill(staging.folder)
        assert not (tmp_path / "out").exists()
        assert staging.publish() == staging.published == tmp_path / "out"
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == NEW


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staging_for(tmp_path / "out") as staging:
        fill(staging.folder)
        staging.publish()
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == NEW


@pytest.mark.parametrize("raised", [ValueError(), KeyboardInterrupt(), SystemExit(3), None])
def test_nothing_is_left_unless_published(tmp_path: Path, raised: BaseException | None) -> None:
    fill(tmp_path / "out", OLD)
    try:
        with staging_for(tmp_path / "out", overwrite=True) as staging:
            fill(staging.folder)
            if raised is not None:
                raise raised
    except BaseException as caught:
        assert caught is raised
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == OLD


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD | {"stale.safetensors": b""})
    with staging_for(tmp_path / "out", overwrite=True) as staging:
        fill(staging.folder)
        staging.publish()
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == NEW


@pytest.mark.parametrize("before", [{}, OLD])
def test_a_failed_one_stands_beside(tmp_path: Path, before: dict[str, bytes]) -> None:
    fill(tmp_path / "out", OLD)
    fill(tmp_path / "out.failed", before)
    with staging_for(tmp_path / "out", overwrite=True) as staging:
        fill(staging.folder)
        assert staging.publish_failed() == tmp_path / "out.failed"
    assert names(tmp_path) == ["out", "out.failed"]
    assert snapshot(tmp_path / "out") == OLD and snapshot(tmp_path / "out.failed") == NEW


@pytest.mark.parametrize(
    ("files", "overwrite", "message"),
    [
        (OLD, False, "is not empty; choose another OUT, or replace it with --overwrite"),
        ({"thesis.txt": b"mine"}, False, "is not empty"),
        ({"thesis.txt": b"mine"}, True, "holds no checkpoint and no report, so it is not replaced"),
        ({"sub/config.json": b"{}"}, True, "holds no checkpoint and no report, so it is not replaced"),
    ],
)
def test_what_is_never_replaced(tmp_path: Path, files: dict[str, bytes], overwrite: bool, message: str) -> None:
    fill(tmp_path / "out", files)
    with pytest.raises(OutputError, match=message):
        check_target(tmp_path / "out", overwrite=overwrite, inputs=[])
    with pytest.raises(OutputError, match=message), staging_for(tmp_path / "out", overwrite):
        pass
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == files


def test_a_folder_in_the_place_of_a_failed_one_is_not_replaced_either(tmp_path: Path) -> None:
    fill(tmp_path / "out.failed", {"thesis.txt": b"mine"})
    with pytest.raises(OutputError, match=r"out\.failed holds no checkpoint"):
        check_target(tmp_path / "out", overwrite=True, inputs=[])


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_to_be_meanwhile_is_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    mine = {"thesis.txt": b"mine"} if overwrite else OLD
    with pytest.raises(OutputError), staging_for(tmp_path / "out", overwrite) as staging:
        fill(staging.folder)
        fill(tmp_path / "out", mine)
        staging.publish()
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == mine


def test_inputs_and_out_stay_apart(tmp_path: Path) -> None:
    model = fill(tmp_path / "outer" / "m")
    (tmp_path / "link").symlink_to(model)
    for out, message in (
        (model, "is the checkpoint that is read"),
        (tmp_path / "link", "is the checkpoint that is read"),
        (model / "out", "lies inside the checkpoint that is read"),
        (tmp_path / "link" / "deep" / "out", "lies inside the checkpoint that is read"),
        (tmp_path / "outer", "lies inside OUT"),
    ):
        with pytest.raises(OutputError, match=message), staged(out, overwrite=True, inputs=[model]):
            pass
    with pytest.raises(OutputError, match="is where a failed OUT would go"):
        check_target(tmp_path / "x", overwrite=True, inputs=[tmp_path / "x.failed"])
    check_target(tmp_path / "outer" / "m2", overwrite=True, inputs=[model])
    assert snapshot(tmp_path / "outer") == {f"m/{name}": data for name, data in NEW.items()}


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    for out, message in (
        (tmp_path / "out", "out is a file; OUT names a folder"),
        (tmp_path / "out" / "deeper" / "still", "out is a file, so .*still cannot be made in it"),
    ):
        with pytest.raises(OutputError, match=message):
            check_target(out, overwrite=True, inputs=[])
        with pytest.raises(OutputError, match=message), staging_for(out, overwrite=True):
            pass
    (tmp_path / "other.failed").touch()
    with pytest.raises(OutputError, match=r"other\.failed is a file"):
        check_target(tmp_path / "other", overwrite=True, inputs=[])
    assert (tmp_path / "out").read_bytes() == b"mine"


@pytest.mark.parametrize("out", ["/", "/dev"])
def test_a_mount_point_is_refused(out: str) -> None:
    with pytest.raises(OutputError, match="is a mount point, which cannot be replaced as a whole"):
        check_target(Path(out), overwrite=True, inputs=[])


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    fill(tmp_path / "real" / "out", OLD)
    (tmp_path / "link").symlink_to("real/out")
    with staging_for(tmp_path / "link", overwrite=True) as staging:
        assert staging.work.path == tmp_path / "real" / WORK_NAME
        fill(staging.folder)
        staging.publish()
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["out"]
    assert snapshot(tmp_path / "real" / "out") == NEW


@pytest.mark.parametrize("name", ["loop", "x" * 300, "a\0b"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match="cannot be used as OUT") as caught:
        check_target(tmp_path / name, overwrite=True, inputs=[])
    assert "\n" not in str(caught.value)


def test_parents_are_made_and_stay_with_the_result(tmp_path: Path) -> None:
    with staging_for(tmp_path / "a" / "b" / "out") as staging:
        fill(staging.folder)
        staging.publish()
    assert snapshot(tmp_path) == {f"a/b/out/{name}": data for name, data in NEW.items()}


def test_parents_are_unmade_without_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError), staging_for(tmp_path / "a" / "b" / "c" / "out") as staging:
        fill(staging.folder)
        raise ValueError
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == []


def test_parents_that_others_use_by_then_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError), staging_for(tmp_path / "a" / "out"):
        (tmp_path / "a" / "other").touch()
        raise ValueError
    assert names(tmp_path / "a") == ["other"]


def test_checking_touches_nothing(tmp_path: Path) -> None:
    check_target(tmp_path / "a" / "b" / "out", overwrite=False, inputs=[])
    assert names(tmp_path) == []


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder that may not be written to, by who this process is meanwhile: permissions do not hold for root."""
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), os.geteuid() == 0
        (folder / "closed").mkdir(mode=0o555)
        folder.chmod(0o755)
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield folder / "closed"
        finally:
            if root:
                os.setresuid(0, 0, 0)


def test_a_folder_that_may_not_be_written_to(closed_folder: Path) -> None:
    for out in (closed_folder / "out", closed_folder / "a" / "out"):
        with pytest.raises(OutputError, match="closed cannot be written to; choose another OUT"):
            check_target(out, overwrite=False, inputs=[])
        with pytest.raises(OutputError, match="cannot be written"), staging_for(out):
            pass


@pytest.mark.parametrize("filename", ["inside", None])
def test_a_full_disk_while_it_is_filled(tmp_path: Path, filename: str | None) -> None:
    with (
        pytest.raises(OutputError, match=r"out cannot be written \(No space left on device\); free space"),
        staging_for(tmp_path / "out") as staging,
    ):
        place = str(staging.folder / filename) if filename else None
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
    assert names(tmp_path) == []


def test_errors_about_other_files_are_not_the_outputs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staging_for(tmp_path / "out"):
        (tmp_path / "elsewhere").read_bytes()


@pytest.mark.parametrize("raised", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["sync", "move aside", "move in"])
def test_publishing_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, raised: BaseException
) -> None:
    fill(tmp_path / "out", OLD)
    rename = Path.rename

    def sync(path: Path) -> None:
        raise raised

    def moved(path: Path, target: Path) -> Path:
        if (path.parent == tmp_path) == (step == "move aside") and path.name == "out":
            raise raised
        return rename(path, target)

    if step == "sync":
        monkeypatch.setattr(output, "sync", sync)
    else:
        monkeypatch.setattr(Path, "rename", moved)
    wanted = OutputError if isinstance(raised, OSError) else KeyboardInterrupt
    with pytest.raises(wanted), staging_for(tmp_path / "out", overwrite=True) as staging:
        fill(staging.folder)
        staging.publish()
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == OLD


def leave(tmp_path: Path, *, journal: bool = True, new: bool = True, **aside: dict[str, bytes]) -> Path:
    """What a killed run leaves: with `new`, it had not published; `aside`, what it had moved aside."""
    work = tmp_path / WORK_NAME
    fill(work, {"lock": b"1 elsewhere\n"} | ({"journal.json": b"{}"} if journal else {}))
    if new:
        fill(work / "out", NEW)
    for name, files in aside.items():
        fill(work / name.replace("_", "."), files)
    return work


def test_what_a_run_left_that_had_finished_something_is_kept(tmp_path: Path) -> None:
    work = leave(tmp_path)
    with staging_for(tmp_path / "out") as staging:
        assert staging.kept and snapshot(staging.folder) == NEW
    assert snapshot(work)["journal.json"] == b"{}" and names(tmp_path) == [WORK_NAME]


def test_it_goes_when_it_is_not_to_be_kept(tmp_path: Path) -> None:
    leave(tmp_path)
    with staging_for(tmp_path / "out") as staging:
        staging.kept = False
    assert names(tmp_path) == []


def test_what_a_run_left_that_had_finished_nothing_is_removed(tmp_path: Path) -> None:
    leave(tmp_path, journal=False)
    with staging_for(tmp_path / "out") as staging:
        assert not staging.kept and names(staging.folder) == []
    assert names(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_run_left_that_had_published(tmp_path: Path, overwrite: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It was killed before it could clean up: OUT is there, and so is the work folder without what became OUT."""
    leave(tmp_path, new=False)
    fill(tmp_path / "out")
    if overwrite:
        with staging_for(tmp_path / "out", overwrite=True) as staging:
            assert not staging.kept and names(staging.folder) == []
    else:
        with pytest.raises(OutputError, match="is not empty"), staging_for(tmp_path / "out"):
            pass
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == NEW
    assert "killed after it had finished: it is removed" in caplog.text


@pytest.mark.parametrize("name", ["out", "out.failed"])
def test_what_a_killed_run_moved_aside_is_put_back(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    leave(tmp_path, **{name.replace("out", "old").replace(".", "_"): OLD})
    with staging_for(tmp_path / "out", overwrite=True) as staging:
        assert snapshot(tmp_path / name) == OLD and snapshot(staging.folder) == NEW
        staging.kept = False
    assert names(tmp_path) == [name] and snapshot(tmp_path / name) == OLD
    assert "moved aside by a run that was killed: it is put back" in caplog.text


def test_what_was_moved_aside_by_a_run_that_published_is_removed(tmp_path: Path) -> None:
    leave(tmp_path, new=False, old=OLD)
    fill(tmp_path / "out")
    with staging_for(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == NEW


def test_without_overwriting_what_is_put_back_is_in_the_way(tmp_path: Path) -> None:
    leave(tmp_path, old=OLD)
    with pytest.raises(OutputError, match="is not empty"), staging_for(tmp_path / "out"):
        pass
    assert names(tmp_path) == [WORK_NAME, "out"] and snapshot(tmp_path / "out") == OLD


def test_a_link_with_such_a_name_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "mine", OLD)
    (tmp_path / WORK_NAME).symlink_to("mine")
    with pytest.raises(OutputError, match="is a link, and no work folder"), staging_for(tmp_path / "out"):
        pass
    assert snapshot(tmp_path / "mine") == OLD


STEPS = ("before", "moved in", "before cleaning", "while cleaning", "after")


@pytest.mark.parametrize(
    ("step", "overwrite"), [*((step, over) for step in STEPS for over in (False, True)), ("moved aside", True)]
)
def test_killed_between_any_two_steps_of_publishing(tmp_path: Path, step: str, overwrite: bool) -> None:
    """A process of its own ends there; the next run has the old OUT or the new one, and loses nothing."""
    if overwrite:
        fill(tmp_path / "out", OLD)
    child = os.fork()
    if not child:
        publishing(tmp_path / "out", step, overwrite)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if step == "after" else 9)
    seen = snapshot(tmp_path / "out") if (tmp_path / "out").exists() else None
    assert seen in {"before": [OLD if overwrite else None], "moved aside": [None]}.get(step, [NEW])
    unfinished = step in ("before", "moved aside") and (overwrite or step == "before")
    if unfinished or overwrite:
        with staging_for(tmp_path / "out", overwrite) as staging:
            assert staging.kept == unfinished
            assert snapshot(staging.folder) == (NEW if unfinished else {})
            assert not overwrite or snapshot(tmp_path / "out") == (OLD if unfinished else NEW)
            fill(staging.folder)
            staging.publish()
    else:
        with pytest.raises(OutputError, match="is not empty"), staging_for(tmp_path / "out"):
            pass
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == NEW


def publishing(out: Path, step: str, overwrite: bool) -> None:
    """Publishes, and ends this process at that step as a kill would."""
    real_rename, real_remove = Path.rename, WorkFolder.remove

    def rename(path: Path, target: Path) -> Path:
        result = real_rename(path, target)
        if step == ("moved aside" if path == out else "moved in"):
            os._exit(9)
        return result

    def remove(work: WorkFolder) -> None:
        if step == "while cleaning":
            work.clear()
        if step in ("before cleaning", "while cleaning"):
            os._exit(9)
        real_remove(work)

    Path.rename, WorkFolder.remove = rename, remove  # type: ignore[method-assign]
    try:
        with staged(out, overwrite=overwrite, inputs=[]) as staging:
            fill(staging.folder)
            staging.work.journal.write_text("{}")
            if step == "before":
                os._exit(9)
            staging.publish()
        os._exit(0)
    finally:
        os._exit(1)


WORK = """
import sys, time
from pathlib import Path
from abliterate.checkpoint.output import staged
with staged(Path(sys.argv[1]), overwrite=False, inputs=[]) as staging:
    (staging.folder / "config.json").write_text("theirs")
    print(staging.folder.name, flush=True)
    sys.stdin.readline()
    staging.publish()
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that works on the same OUT."""
    command = [sys.executable, "-c", WORK, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_second_of_two_runs_is_told(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    assert other_run.stdout is not None
    other_run.stdout.readline()
    before = snapshot(tmp_path)
    told = rf"another run \(process {other_run.pid} on .+\) is writing .*out; wait for it, or choose another OUT"
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=told), staging_for(tmp_path / "out", overwrite):
            pass
    assert snapshot(tmp_path) == before
    other_run.communicate("go on\n", timeout=60)
    assert other_run.returncode == 0
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == {"config.json": b"theirs"}


def test_after_a_kill_the_next_run_has_the_folder(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    assert other_run.stdout is not None
    other_run.stdout.readline()
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    assert names(tmp_path) == [WORK_NAME]
    with staging_for(tmp_path / "out") as staging:
        fill(staging.folder)
        staging.publish()
    assert names(tmp_path) == ["out"] and snapshot(tmp_path / "out") == NEW
