"""Files and folders that are there whole or not at all, locks, and the cache of derived data."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import accelerando.base.files
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import (
    cache_folder,
    check_can_be_made,
    derived,
    hold,
    locked,
    open_whole,
    release,
    whole_folder,
    write_text,
)


def killed(function: Callable[[], None]) -> None:
    """Runs ``function``, which kills its process, in a child."""
    child = os.fork()
    if not child:
        function()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def age(folder: Path) -> None:
    """Makes what is in ``folder`` an hour old, and has the next write look again at what is there."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    accelerando.base.files._drafts_in.cache_clear()


def test_a_file_is_replaced_whole_and_its_mode_is_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "ä")
        with open_whole(tmp_path / "b.bin", "wb") as file:
            file.write(b"\0")
            assert not (tmp_path / "b.bin").exists()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [0o640, 0o640]
    (tmp_path / "link").symlink_to("a.txt")
    write_text(tmp_path / "link", "ö")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a.txt").read_bytes() == "ö".encode()
    with pytest.raises(KeyboardInterrupt), open_whole(tmp_path / "a.txt") as file:
        file.write("half")
        raise KeyboardInterrupt
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "x")
    assert (tmp_path / "a.txt").read_bytes() == "ö".encode()
    assert names(tmp_path) == ["a.txt", "b.bin", "link"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(draft: Path) -> None:
        draft.mkdir()
        (draft / "a").write_text("new")

    write_text(tmp_path / "file", "old")
    with whole_folder(tmp_path / "folder") as draft:
        draft.mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "file", "new")
    for options in ({}, {"file_by_file": True}):
        with pytest.raises(OSError, match="No space left"), whole_folder(tmp_path / "folder", **options) as draft:
            fill(draft)
    assert (tmp_path / "file").read_text() == "old" and not names(tmp_path / "folder")
    assert names(tmp_path) == ["file", "folder"]

    def make(target: Path) -> None:
        with whole_folder(target) as draft:
            fill(draft)

    with pytest.raises(UserError, match=r"--cache_dir .*cache: No space left on device.*name another folder"):
        derived(tmp_path / "cache" / "kind" / "x", lambda target: (target / "a").read_text(), make)
    assert names(tmp_path / "cache" / "kind") == ["x.lock"]


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    def write() -> None:
        with open_whole(tmp_path / "file") as file, whole_folder(tmp_path / "folder") as draft:
            draft.mkdir()
            file.write("half")
            die()

    killed(write)
    drafts = names(tmp_path)
    assert len(drafts) == 2 and all(name.endswith(".draft") for name in drafts)
    age(tmp_path)
    with open_whole(tmp_path / "file") as one:  # two at once, of one name
        age(tmp_path)
        write_text(tmp_path / "file", "second")
        one.write("first")
    with whole_folder(tmp_path / "folder") as draft:
        draft.mkdir()
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "first"


def test_a_draft_is_known_by_its_process_and_not_by_a_number_alone(tmp_path: Path) -> None:
    """In a container each run has the same process id; on a shared disk other machines have processes of that id."""
    own = accelerando.base.files._draft_of(tmp_path / "x").name
    place, start = own.split("-")[1:3]
    foreign = "0" * 8
    drafts = {
        f".x.{os.getpid()}-{place}-{start}-aa.draft": True,  # this process
        f".x.{os.getpid()}-{place}-{int(start) - 1}-aa.draft": False,  # one before it with its number
        f".x.{os.getpid()}-{foreign}-{start}-aa.draft": False,  # of a machine that is not seen, an hour old
        f".x.{os.getpid()}-ab.draft": True,  # of an earlier version: it may still run
        f".x.{2**22 + 1}-ab.draft": False,
    }
    for name in drafts:
        (tmp_path / name).write_text("half")
    age(tmp_path)
    young = f".x.{os.getpid()}-{foreign}-{start}-bb.draft"
    (tmp_path / young).mkdir()
    os.utime(tmp_path / young, (0, 0))
    (tmp_path / young / "a").write_text("it is still being written")
    write_text(tmp_path / "x", "whole")
    assert names(tmp_path) == sorted(["x", young, *(name for name, stays in drafts.items() if stays)])


def test_what_was_left_in_the_cache_goes_with_the_next_thing_that_is_made(tmp_path: Path) -> None:
    """Otherwise a cache that was half made and is never asked for again would lie there for ever."""

    def make(target: Path) -> None:
        with whole_folder(target) as draft:
            draft.mkdir()
            die()

    killed(lambda: derived(tmp_path / "kind" / "once", Path.stat, make))
    assert any(name.endswith(".draft") for name in names(tmp_path / "kind"))
    accelerando.base.files._drafts_in.cache_clear()
    derived(tmp_path / "kind" / "other", Path.read_text, lambda target: write_text(target, "whole"))
    assert names(tmp_path / "kind") == ["once.lock", "other", "other.lock"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_numpys_own_error_of_a_full_disk_is_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no number, and says "8 requested and 0 written"."""

    def fill(write: Callable[[object], None]) -> None:
        with open("/dev/full", "wb") as file:
            write(file)

    array = np.zeros(100_000)
    for write in (array.tofile, lambda file: np.save(file, array), lambda file: file.write(array.data)):
        with pytest.raises(
            UserError, match=r"--cache_dir .*: No space left on device: free some space or name another"
        ):
            derived(tmp_path / "kind" / "x", Path.read_text, lambda _, write=write: fill(write))
        with pytest.raises(SystemExit) as ended, errors_in_one_line():
            fill(write)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert "No space left on device" in error and "free some space" in error and error.count("\n") == 1


def test_a_path_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path / "file" / "a" / "b", "Not a directory"), (tmp_path / "file", "File exists")):
        with pytest.raises(SystemExit), errors_in_one_line():
            path.mkdir(parents=True)
        line = capsys.readouterr().err
        assert line.startswith("error: cannot use ") and f"{reason}; name another path" in line
    check_can_be_made(tmp_path / "a" / "b" / "c", "--output_dir")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match=r"--output_dir .*/file/a/b: .*/file is not a folder; name another path"):
        check_can_be_made(tmp_path / "file" / "a" / "b", "--output_dir")
    with pytest.raises(FileNotFoundError), errors_in_one_line():  # most likely a defect: keeps its traceback
        (tmp_path / "none").read_text()


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(text: str) -> None:
        with whole_folder(tmp_path / "folder") as draft:
            draft.mkdir()
            (draft / "a").write_text(text)

    replace("first")
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, to: die() if self.suffix == ".draft" else rename(self, to))
        killed(lambda: replace("second"))
    assert "folder" not in names(tmp_path)
    age(tmp_path)
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "folder"):
        assert (tmp_path / "folder" / "a").read_text() == "first"
        raise RuntimeError
    assert (tmp_path / "folder" / "a").read_text() == "first"
    replace("third")
    assert names(tmp_path) == ["folder"] and (tmp_path / "folder" / "a").read_text() == "third"


def test_file_by_file_the_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name in ("mine", "sub/mine", "sub/theirs"):
        (tmp_path / "folder" / name).write_text("old")
    with whole_folder(tmp_path / "folder", file_by_file=True) as draft:
        (draft / "sub").mkdir(parents=True)
        (draft / "sub" / "theirs").write_text("new")
    assert [(tmp_path / "folder" / name).read_text() for name in ("mine", "sub/mine", "sub/theirs")] == [
        "old", "old", "new",
    ]  # fmt: skip
    assert names(tmp_path) == ["folder"]


def take(path: Path, answers: multiprocessing.Queue) -> None:
    try:
        with locked(path, patience=0.1):
            answers.put("free")
    except BlockingIOError:
        answers.put("taken")


def test_a_lock_keeps_out_processes_and_threads_and_goes_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def asked(kind: type) -> str:
        worker = kind(target=take, args=(tmp_path / "lock", answers))
        worker.start()
        worker.join()  # a forked child ends: it neither has the lock nor gives it away
        return answers.get(timeout=10)

    with locked(tmp_path / "lock"):
        assert [asked(context.Process), asked(threading.Thread), asked(context.Process)] == ["taken"] * 3
    assert [asked(context.Process), asked(threading.Thread)] == ["free"] * 2

    def hold_and_die() -> None:
        with locked(tmp_path / "lock"):
            if not os.fork():
                time.sleep(2)  # outlives the holder
                os._exit(0)
            die()

    killed(hold_and_die)
    assert asked(context.Process) == "free"


def test_a_run_folder_is_held_until_it_is_released_and_cleared_of_drafts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(accelerando.base.files, "LOCK_PATIENCE", 0.1)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def other() -> None:
        accelerando.base.files.held_locks.clear()  # a run of its own
        try:
            hold(tmp_path)
            answers.put("free")
        except UserError as error:
            answers.put(str(error))

    def asked() -> str:
        worker = context.Process(target=other)
        worker.start()
        return answers.get(timeout=10)

    (tmp_path / ".best.1-ab.draft").mkdir()
    hold(tmp_path)
    hold(tmp_path)
    assert names(tmp_path) == [".lock"]
    for _ in range(2):
        assert re.fullmatch(rf"{tmp_path} is in use by process {os.getpid()} on .+, since .+: wait until .+", asked())
    release(tmp_path)
    assert asked() == "free"


def make_slowly(cache: Path, made: Path, answers: multiprocessing.Queue) -> None:
    logging.getLogger("accelerando").setLevel(logging.INFO)
    logging.getLogger("accelerando").handlers = [logging.FileHandler(made.with_suffix(".log"))]

    def make(target: Path) -> None:
        with open_whole(target) as file, open(made, "a") as note:
            note.write("x")
            time.sleep(0.5)
            file.write("content")

    answers.put(derived(cache / "kind" / "x", Path.read_text, make))


def test_of_processes_that_want_the_same_one_makes_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    args = (tmp_path / "cache", tmp_path / "made", answers)
    workers = [context.Process(target=make_slowly, args=args) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [answers.get(timeout=30) for _ in workers] == ["content"] * 3
    assert (tmp_path / "made").read_text() == "x"
    lines = (tmp_path / "made.log").read_text().splitlines()
    assert lines == [f"Another run is making {tmp_path}/cache/kind/x: waiting for it"] * 2


def test_derived_data_is_made_again_where_it_is_damaged(tmp_path: Path, caplog, monkeypatch) -> None:
    logging.getLogger("accelerando").propagate = True

    def read(target: Path) -> str:
        text = target.read_text()
        if text != "whole":
            raise ValueError("half of it is gone")
        return text

    target = tmp_path / "kind" / "x"
    target.parent.mkdir()
    (target.parent / ".x.1-ab.draft").mkdir()  # of one that was killed: who has the lock is alone
    assert derived(target, read, lambda target: write_text(target, "whole")) == "whole"
    target.write_text("wh")
    assert derived(target, read, lambda target: write_text(target, "whole")) == "whole"
    lines = {record.message for record in caplog.records if record.levelname == "WARNING"}
    assert lines == {f"{target} is corrupted and will be made again: half of it is gone"}
    assert names(target.parent) == ["x", "x.lock"]


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delenv("ACCELERANDO_CACHE", raising=False)
    with pytest.raises(UserError, match=r"--cache_dir .*accelerando: Not a directory; name a folder that is writable"):
        derived(cache_folder() / "kind" / "x", Path.read_text, lambda target: None)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user whom the system does not know
    with pytest.raises(UserError, match="--cache_dir"):
        cache_folder()
