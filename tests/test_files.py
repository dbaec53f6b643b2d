"""Files that are complete or absent, links, and the check before long work."""

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


def test_check_writable_names_the_path_and_leaves_nothing(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    files.check_writable("file")
    (tmp_path / "old").write_bytes(b"old")
    for path, reason in [
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "file", "No such file or directory"),
        (tmp_path / "old" / "file", "Not a directory"),
    ]:
        with pytest.raises(UserError, match=f"cannot write {path}: .*{reason}.*Give a file"):
            files.check_writable(path)
    assert os.listdir(tmp_path) == ["old"]
