"""Files that are complete or absent."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from training.console import UserError


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` is at every moment absent, the complete old file or the complete new file.

    A symbolic link stays, and its target is replaced.

    Args:
        path: file to write; its folder must exist.
        write: called with a binary file open for writing.

    Raises:
        Any exception of `write` or the file system; the temporary file is removed and `path` is unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or os.fspath(path)  # a full disk has no file name
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def check_writable(path: str | Path) -> None:
    """Raise UserError if atomic_write could not write to `path`; to be called before long work."""
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(None, "Is a directory")
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. Give a file in an existing folder that you can write to."
        ) from None
