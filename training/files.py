"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from training.console import UserError

# Errors of fsync on file systems that have none, such as some network mounts.
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` is at every moment absent, the old whole file or the new whole file.

    A symbolic link stays, and its target is replaced. What exists and is not a regular file (a device, a
    FIFO, /dev/stdout, a shell's process substitution) is opened and written directly.

    Args:
        path: file to write; its folder must exist.
        write: called with a binary file open for writing.

    Raises:
        Any exception of `write` or the file system; the temporary file is removed and `path` is unchanged.
    """
    try:
        if _is_special(path):
            with open(path, "wb") as file:
                write(file)
        else:
            _replace(Path(os.path.realpath(path)), write)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk has no file name
        raise


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in NO_FSYNC:
                    raise
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        _sync_folder(path.parent)


def check_writable(path: str | Path) -> None:
    """Raise UserError if atomic_write could not write to `path`; to be called before long work."""
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not _is_special(path):
            with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
                return
        if not os.access(path, os.W_OK):  # opening a FIFO would end its reader's input
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. Give a file in an existing folder that you can write to."
        ) from None


def _is_special(path: str | Path) -> bool:
    # Not by the resolved path: for /dev/stdout on a pipe that would be a name that does not exist.
    return os.path.exists(path) and not os.path.isfile(path)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
