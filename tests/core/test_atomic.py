"""A file or folder is the old one or the new one, whatever moment the process dies in."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leantune.core import atomic
from leantune.core.atomic import is_left_over, naming, new_folder, recover, sweep, write_bytes, write_json, write_text

# Dies (no cleanup, as by SIGKILL) at the n-th call that changes or flushes a file; exits 0 when there are fewer.
_VICTIM = """
import os, sys
from pathlib import Path
from leantune.core import atomic
target, dies_at, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = 0
def deadly(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == dies_at:
            os._exit(9)
        return function(*args, **kwargs)
    return call
for module, name in ((os, "replace"), (os, "fsync"), (atomic.shutil, "rmtree")):
    setattr(module, name, deadly(getattr(module, name)))
if what == "file":
    atomic.write_text(target, "new" * 1000)
else:
    with atomic.new_folder(target) as folder:
        (folder / "a.txt").write_text("new")
        (folder / "deep").mkdir()
        (folder / "deep" / "b.txt").write_text("new")
"""
ENOUGH = 40


def _die(target: Path, at: int, what: str) -> bool:
    """Run the victim; True when it died at that call, False when it lived to the end."""
    done = subprocess.run([sys.executable, "-c", _VICTIM, str(target), str(at), what], capture_output=True, text=True)
    assert done.returncode in (0, 9), done.stderr
    return done.returncode == 9


def test_a_file_is_the_old_or_the_new_one_at_every_death(tmp_path: Path) -> None:
    seen = set()
    for at in range(1, ENOUGH):
        target = tmp_path / f"{at}" / "file.txt"
        write_text(target, "old" * 1000)
        died = _die(target, at, "file")
        text = target.read_text(encoding="utf-8")
        assert text in ("old" * 1000, "new" * 1000)
        seen.add(text[:3])
        if not died:
            break
    assert not died, "the victim never lived to the end"
    assert seen == {"old", "new"}


def _contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_folder_is_the_old_or_the_new_one_at_every_death(tmp_path: Path) -> None:
    old, new = {"a.txt": "old", "gone.txt": "old"}, {"a.txt": "new", "deep/b.txt": "new"}
    seen = []
    for at in range(1, ENOUGH):
        target = tmp_path / f"{at}" / "run"
        with new_folder(target) as folder:
            for name, text in old.items():
                (folder / name).write_text(text, encoding="utf-8")
        died = _die(target, at, "folder")
        recover(target)
        assert _contents(target) in (old, new), f"death {at} left half a folder"
        seen.append(_contents(target) == new)
        assert not list(target.parent.glob(".*.previous"))
        if not died:
            break
    assert not died, "the victim never lived to the end"
    assert seen == sorted(seen), "once the new one is there it stays"
    assert not seen[0]
    assert seen[-1]


def test_the_next_writer_recovers_too(tmp_path: Path) -> None:
    """A death between the two renames, then a writer that fails: the old folder is back all the same."""
    target = tmp_path / "run"
    with new_folder(target) as folder:
        (folder / "a.txt").write_text("old", encoding="utf-8")
    os.replace(target, tmp_path / ".run.previous")
    with pytest.raises(RuntimeError, match="full"), new_folder(target):
        raise RuntimeError("the disk is full")
    assert _contents(target) == {"a.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_filling_leaves_no_trace(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "run") as folder:
        (folder / "a.txt").write_text("half", encoding="utf-8")
        raise error("stopped")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.txt"
    write_text(target, "old")

    def refuse(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="no space left"):
        write_text(target, "new")
    assert target.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_everything_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    real_replace, real_fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *args: (events.append("replace"), real_replace(*args))[1])
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), real_fsync(descriptor))[1])
    write_bytes(tmp_path / "file", b"x")
    assert events[:2] == ["fsync", "replace"]
    events.clear()
    with new_folder(tmp_path / "run") as folder:
        (folder / "a.txt").write_text("x", encoding="utf-8")
    assert "fsync" in events[: events.index("replace")]


def test_parents_are_made_and_text_is_utf8(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "c.txt"
    write_text(target, "ä→日")
    assert target.read_bytes() == "ä→日".encode()


def test_json_is_readable_by_people(tmp_path: Path) -> None:
    value = {"b": 1, "a": ["é", None, 1.5]}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert list(json.loads(text)) == ["b", "a"]
    assert "é" in text
    assert text.count("\n") > 3
    assert text.endswith("\n")


def test_recover_of_what_was_never_there_does_nothing(tmp_path: Path) -> None:
    recover(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gone() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_next_writer_clears_away_what_a_dead_one_left_and_nobody_elses(tmp_path: Path, gone: int) -> None:
    here = atomic._place()
    names = {
        "dead": f".a.txt.tmp-{gone}-{here}",
        "alive": f".a.txt.tmp-{os.getppid()}-{here}",
        "own": f".a.txt.tmp-{os.getpid()}-{here}",
        "elsewhere": f".a.txt.tmp-{gone}-0123abcd",
        "forgotten": f".a.txt.tmp-{gone}-0123abce",
        "another": f".b.txt.tmp-{gone}-{here}",
        "stranger": ".a.txt.tmp-notes",
    }
    for name in names.values():
        (tmp_path / name).write_text("half", encoding="utf-8")
    os.utime(tmp_path / names["forgotten"], (0, 0))
    left_over = {key for key, name in names.items() if is_left_over(tmp_path / name)}
    assert left_over == {"dead", "forgotten", "another"}
    # Writing takes the name of its own process, so that one goes with it.
    write_text(tmp_path / "a.txt", "whole")
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"a.txt", *(names[key] for key in ("alive", "elsewhere", "another", "stranger"))}
    sweep(tmp_path)
    assert names["another"] not in {path.name for path in tmp_path.iterdir()}
    sweep(tmp_path / "absent")


def test_a_folder_of_a_dead_writer_goes_too(tmp_path: Path, gone: int) -> None:
    half = tmp_path / f".run.tmp-{gone}-{atomic._place()}"
    half.mkdir()
    (half / "a.txt").write_text("half", encoding="utf-8")
    with new_folder(tmp_path / "run") as folder:
        (folder / "a.txt").write_text("whole", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_rename_that_fails_leaves_the_old_folder_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "run"
    with new_folder(target) as folder:
        (folder / "a.txt").write_text("old", encoding="utf-8")
    genuine, calls = os.replace, []

    def failing(source: Path, to: Path) -> None:
        calls.append(to)
        if len(calls) == 2:
            raise OSError(errno.EIO, "planted")
        genuine(source, to)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="planted") as caught, new_folder(target) as folder:
        (folder / "a.txt").write_text("new", encoding="utf-8")
    assert caught.value.filename == str(target), "the error names what was being written"
    assert _contents(target) == {"a.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_error_names_the_file_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full") as caught, naming(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.filename == str(tmp_path / "a.txt")
    with pytest.raises(OSError, match="full") as caught, naming(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "full", "/another/file")
    assert caught.value.filename == "/another/file"
    assert not atomic.is_running("torn")
    assert atomic.is_running(f"{os.getppid()}-{atomic._place()}")
