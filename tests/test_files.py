"""Files that are complete or absent, and links."""

import os

from training import files

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
        write(link, text)
        assert link.is_symlink() and target.read_bytes() == text
    assert os.listdir(tmp_path / "folder") == ["target"]
