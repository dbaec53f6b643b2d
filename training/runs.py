"""Run folders: `runs/<name>/` with four files.

args.json    arguments, command line, versions, hardware
log.jsonl    one JSON object per event, appended during training; readable at any moment
best.pt      the model with the best score so far
last.pt      everything needed to resume exactly where the run stands
"""

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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from training.console import UserError, command, warn
from training.files import atomic_write

import numpy as np
import torch

VERSION = "2.0"  # of this project, noted in every run and checkpoint
FILES = ("args.json", "log.jsonl", "best.pt", "last.pt")

# ---- JSON files


def read_json(path: str | Path) -> Any:
    """Return the contents of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _encode_json(record: dict[str, Any], indent: int | None = None) -> bytes:
    """Return a record as JSON in ASCII, with null for numbers that are not finite."""
    return (json.dumps(_only_finite(record), indent=indent, allow_nan=False) + "\n").encode()


def _only_finite(value: Any) -> Any:
    """Return plain data with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _only_finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_only_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- run folders


def create_run_folder(root: str | Path, name: str | None, script: str, record: dict[str, Any]) -> Path:
    """Create a new run folder with args.json in it, and return it.

    Args:
        root: the folder of all runs; created if missing.
        name: name of the folder; None for script, date and time, as in 'train_rmc-2026-11-22-131500'.
        script: name of the script without '.py'.
        record: contents of args.json.

    Raises:
        UserError: the name is taken or not a plain name, or `root` cannot be written.
    """
    root = Path(root)
    if name is not None and not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UserError(
            "--name must be at most 100 letters, digits, '-', '_' and '.', starting with a letter, "
            f"digit or '_', got {name!r}."
        )
    base = name or f"{script}-{time.strftime('%Y-%m-%d-%H%M%S')}"
    folder, attempt = root / base, 1
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()
                break
            except FileExistsError:
                if name is not None:
                    resume = command(script, "--resume", folder)
                    raise UserError(
                        f"{folder} already exists. Choose another --name, or resume that run: {resume}"
                    ) from None
                attempt += 1
                folder = root / f"{base}-{attempt}"
        atomic_write(folder / "args.json", lambda file: file.write(_encode_json(record, indent=2)))
    except OSError as error:
        raise UserError(
            f"cannot create a run folder in {root}: {error.strerror}. Choose another --runs-folder."
        ) from None
    return folder


def discard_run_folder(folder: Path) -> None:
    """Remove a run's files, and its folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for path in (*(folder / name for name in FILES), *folder.glob(".*.tmp")):
            path.unlink(missing_ok=True)
        folder.rmdir()


def newest_run(root: str | Path, scripts: Sequence[str]) -> Path | None:
    """Return the run of one of these scripts with the newest best.pt, or None."""
    folders = [path.parent for path in Path(root).glob("*/best.pt") if _script_of(path.parent) in scripts]
    return max(folders, key=lambda folder: (folder / "best.pt").stat().st_mtime, default=None)


def _script_of(folder: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return read_json(folder / "args.json")["script"]
    return None


# ---- args.json


def record_of(
    script: str, args: argparse.Namespace, argv: Sequence[str] | None, **facts: Any
) -> dict[str, Any]:
    """Return the contents of a new run's args.json; `facts` are further entries."""
    return {"script": script, "arguments": vars(args), **_session("started", argv), **facts}


def note_resume(
    folder: Path, args: argparse.Namespace | None, argv: Sequence[str] | None, **facts: Any
) -> None:
    """Set the arguments in args.json to these, if any, and add an entry about this resumption."""
    for leftover in folder.glob(".*.tmp"):  # of a killed process
        leftover.unlink(missing_ok=True)
    record = read_json(folder / "args.json")
    if args is not None:
        record["arguments"] = {**vars(args), "resume": None}
    record.setdefault("resumed", []).append(_session("at", argv) | facts)
    atomic_write(folder / "args.json", lambda file: file.write(_encode_json(record, indent=2)))


def _session(time_name: str, argv: Sequence[str] | None) -> dict[str, Any]:
    return {
        "command_line": list(sys.argv[1:] if argv is None else argv),
        time_name: time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": describe_environment(),
    }


def saved_arguments(folder: Path, script: str) -> dict[str, Any]:
    """Return the arguments in a run folder's args.json.

    Raises:
        UserError: the folder is not a run of this script.
    """
    found = _script_of(folder)
    if found is None:
        raise UserError(f"{folder} is not a run folder: it has no valid args.json. Name the folder of a run.")
    if found != script:
        raise UserError(f"{folder} is a run of {found}.py, not of {script}.py. Use {found}.py.")
    return read_json(folder / "args.json")["arguments"]


def describe_environment() -> dict[str, Any]:
    """Return versions and hardware, for the record of a run."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
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
        "gpus": [torch.cuda.get_device_name(index) for index in range(count)],
        "cuda": torch.version.cuda,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ---- log.jsonl


class RunLog:
    """Appends events to a log file, one JSON object per line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, event: str, **fields: Any) -> None:
        """Append an event. If this fails, warn and continue."""
        line = _encode_json({"event": event, **fields})
        try:
            with open(self.path, "ab") as file:  # each time: a network disk may come back
                file.write(line)
        except OSError as error:
            warn(f"could not write to {self.path}: {error.strerror}; training continues")


def log_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield every event of a log file. Lines that are not events, such as half-written ones, are skipped."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                if isinstance(event := json.loads(line), dict):
                    yield event


def drop_repeated(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return events in order, without those that a resumed run repeated.

    An event {"event": "resume", "step": s} cancels all earlier events after step s. A run that was killed
    between logging and saving logs that step again: of two events of one kind at one step, the later one
    counts instead of the earlier one.
    """
    kept: dict[tuple[Any, Any], dict[str, Any]] = {}  # by kind and step
    for event in events:
        kind, step = event.get("event"), event.get("step", 0)
        if kind == "resume":
            kept = {key: earlier for key, earlier in kept.items() if key[1] <= step}
        kept[kind, step] = event
    return list(kept.values())


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Return the events of a log file in order, without those that a resumed run repeated."""
    return drop_repeated(log_events(path))
