"""Files that are whole or absent, links and devices, and the check before long work."""

import errno
import os

from training import files
from training.console import UserError

import pytest


def write(path, text=b"new"):
    files.atomic_write(path, lambda file: file.write(text))


def test_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        assert path.read_bytes() == b"old"
        raise ValueError

    with pytest.raises(ValueError):
        files.atomic_write(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    write(path)
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_symbolic_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    link.symlink_to(os.path.join("folder", "target"))
    for text in (b"created", b"replaced"):
        files.check_writable(link)
        write(link, text)
        assert link.is_symlink() and target.read_bytes() == text
    assert os.listdir(tmp_path / "folder") == ["target"]


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="needs /dev/fd")
def test_pipe_of_a_process_substitution_is_written_directly():
    readable, writable = os.pipe()
    path = f"/dev/fd/{writable}"
    files.check_writable(path)
    write(path)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught:
        files.atomic_write(path, full)
    assert caught.value.filename == path
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        assert pipe.read() == b"new"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_missing_fsync_is_ignored_and_its_failure_is_not(tmp_path, monkeypatch, code):
    def fsync(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(OSError) as caught:
            write(tmp_path / "file")
        assert caught.value.filename == str(tmp_path / "file") and os.listdir(tmp_path) == []
    else:
        write(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == b"new"


def test_check_writable_names_the_path_and_leaves_nothing(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    files.check_writable("file")
    (tmp_path / "old").write_bytes(b"old")
    for path, reason in [
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "file", "No such file or directory"),
        (tmp_path / "old" / "file", "Not a directory"),
        ("/proc/file", "."),
    ]:
        with pytest.raises(UserError, match=f"cannot write {path}: .*{reason}.*Give a file"):
            files.check_writable(path)
    assert os.listdir(tmp_path) == ["old"]
