"""Run folders: args.json, log.jsonl, locks."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from training.console import UserError, warn
from training.files import atomic_write

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

VERSION = "1.0"  # of this project, noted in every run and checkpoint


def create_run_folder(root: str | Path, name: str | None, script: str) -> Path:
    """Makes a new folder for a run under `root` and returns it; never one that was there before.

    Args:
        root: made when missing.
        name: the folder's name, None for script, date and time, as in 'train_rmc-2026-11-22-131500'.
        script: name of the script without '.py'.

    Raises:
        UserError: the name is taken or not a plain name, or `root` cannot be written.
    """
    root = Path(root)
    if name is not None and not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UserError(
            f"--name must be at most 100 letters, digits, '-', '_' and '.', starting with a letter or digit, "
            f"got {name!r}."
        )
    base = name or f"{script}-{time.strftime('%Y-%m-%d-%H%M%S')}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            folder = root / (base if attempt == 1 else f"{base}-{attempt}")
            try:
                folder.mkdir()  # atomic: of two runs started in the same second one gets it
                return folder
            except FileExistsError:
                if name is not None:
                    advice = (
                        f"or go on with that run: --resume {folder}"
                        if (folder / "args.json").is_file()
                        else "or remove that folder: it has no args.json, so there is no run to go on with."
                    )
                    raise UserError(f"{folder} is there already. Choose another --name, {advice}") from None
    except OSError as error:
        raise UserError(
            f"cannot make a run folder in {root}: {error.strerror}. Give another --runs-folder."
        ) from None
    raise UserError(f"{root} has a thousand runs named {base}. Give a --name.")


def discard_run_folder(folder: str | Path) -> None:
    """Removes a run folder that came to nothing, unless there is more in it than a run writes."""
    folder = Path(folder)
    with contextlib.suppress(OSError):
        for name in ("args.json", "log.jsonl", "best.pt", "last.pt", LOCK):
            (folder / name).unlink(missing_ok=True)
        remove_half_written(folder)
        folder.rmdir()


def discard_unbegun_run_folder(folder: str | Path) -> None:
    """Removes the folder of a run that was killed before a word was in it, unless somebody trains in it."""
    folder = Path(folder)
    with contextlib.suppress(OSError, UserError), locked(folder):
        if not (folder / "args.json").exists():
            remove_half_written(folder)
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def remove_half_written(folder: Path) -> None:
    """Removes what writes that were killed half-way have left."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


# ---- one process per run folder

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps all other processes from training in a run folder, where the system has locks (not on Windows).

    The system sets the lock free when the process ends, however it ends. The file that carries it is removed
    at the end, and left by a kill, which hinders nobody.

    Raises:
        UserError: another process has the lock.
    """
    if fcntl is None:
        yield
        return
    path = Path(folder) / LOCK
    file = _lock(path)
    try:
        yield
    finally:
        if _is_at(file, path):  # else the folder has gone meanwhile, and another may be in its place
            with contextlib.suppress(OSError):
                path.unlink()
        file.close()


def _lock(path: Path) -> BinaryIO:
    while True:
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 (open as long as the lock is held)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode("utf-8", errors="replace")
            file.close()
            raise UserError(
                f"{path.parent} is in training by another process{f' ({holder})' if holder else ''}. Wait "
                "for its end or stop it (Ctrl-C, or kill with its number), then go on with --resume."
            ) from None
        except OSError as error:  # a file system without locks
            warn(f"cannot lock {path} ({error.strerror}): see to it that nothing else trains in that folder")
            return file
        if _is_at(file, path):
            with contextlib.suppress(OSError):  # a full disk is no reason to stop: only messages want it
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}".encode())
            return file
        file.close()  # its last holder removed the file between the two calls above


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def newest_run(root: str | Path, scripts: Sequence[str] | None = None) -> Path | None:
    """The run folder under `root` whose best.pt was written last, of the given scripts' runs; or None."""
    runs = [
        path.parent
        for path in Path(root).glob("*/best.pt")
        if scripts is None or _script_of(path.parent) in scripts
    ]
    return max(runs, key=lambda folder: (folder / "best.pt").stat().st_mtime, default=None)


def _script_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / "args.json").read_text(encoding="utf-8"))["script"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_arguments(
    folder: Path, script: str, args: argparse.Namespace, argv: Sequence[str] | None, **facts: Any
) -> None:
    """Writes args.json: arguments, command line, versions, hardware, and further `facts` of the run."""
    record = {
        "script": script,
        "arguments": vars(args),
        "command_line": list(sys.argv[1:] if argv is None else argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": describe_environment(),
        **facts,
    }
    _write_json(folder / "args.json", record)


def note_resume(folder: Path, args: argparse.Namespace, argv: Sequence[str] | None, **facts: Any) -> None:
    """Brings args.json up to date when a run goes on: its arguments as they are now; when, how, on what."""
    remove_half_written(folder)
    record = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    record["arguments"] = {**vars(args), "resume": None}
    record.setdefault("resumed", []).append(
        {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command_line": list(sys.argv[1:] if argv is None else argv),
            "environment": describe_environment(),
            **facts,
        }
    )
    _write_json(folder / "args.json", record)


def _write_json(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, lambda file: file.write(text.encode("utf-8")))


def describe_environment() -> dict[str, Any]:
    """Versions and hardware, for the record of a run."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "project": VERSION,
        "commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


# ---- log


class RunLog:
    """Appends events to a log file, one JSON object per line, each line flushed as it is written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # A run that was killed may have left half a line; end it, so that it spoils only itself.
        with open(self.path, "ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def write(self, event: str, **fields: Any) -> None:
        """Appends one event. Non-finite numbers become null, for which JSON has no word.

        A failed write only warns: no log line is worth a run.
        """
        line = json.dumps(
            {"event": event, **{key: _finite_or_none(value) for key, value in fields.items()}},
            ensure_ascii=False,
            allow_nan=False,
        )
        try:
            with open(
                self.path, "ab"
            ) as file:  # opened anew each time: a log moved or a disk remounted is no end
                file.write(line.encode("utf-8") + b"\n")
        except OSError as error:
            warn(f"could not write to {self.path}: {error.strerror}; training goes on")


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The events of a log, in order, each once.

    A half-written line is skipped. An event {"event": "resume", "step": s} takes back what was logged after
    step s: the run went on from there and logged those steps again. Of two events of one kind at one step the
    later counts, in the place of the earlier: a run killed between logging and saving logs that step again.
    """
    events: dict[
        tuple[Any, Any], dict[str, Any]
    ] = {}  # by kind and step; a dict keeps the place of a replaced key
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(event, dict):
                continue
            kind, step = event.get("event"), event.get("step", 0)
            if not isinstance(step, (int, float)) or not isinstance(kind, (str, type(None))):
                continue  # not written by a run
            if kind == "resume":
                events = {key: earlier for key, earlier in events.items() if key[1] <= step}
            events[kind, step] = event
    return list(events.values())
