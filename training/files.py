"""Files that are complete or absent."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


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
            error.filename = os.fspath(path)  # not that of the temporary file, or none for a full disk
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
