"""What training scripts share and models need not know: run folders, logs, checkpoints, devices, interrupts.

A run is a folder, `runs/<name>/`, with four files:
    args.json    what was asked for and on what: arguments, command line, versions, hardware
    log.jsonl    one JSON object per event, appended as training goes; readable at any moment
    best.pt      the model with the best score so far, enough to rebuild and use it
    last.pt      everything needed to go on exactly where the run stands
and, while a process trains in it, .lock, by which that process keeps others out.

Checkpoints hold plain data only (tensors, numbers, strings, lists, dicts): reading one can run no code. They
are written under a temporary name and renamed, so a file of the right name is a whole file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

VERSION = "1.0"  # of this project, noted in every run and checkpoint
CHECKPOINT_FORMAT = 1  # raised when a checkpoint's contents change so that older code cannot read them

EXIT_USER_ERROR = 2  # what argparse uses too
EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shells' custom


# ---- errors, exit status


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; appends defaults to the help, but not where they say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


class UserError(Exception):
    """A mistake that the user can mend. The message says what was wrong, what was found and what to do."""


def print_error(message: str) -> None:
    """Prints the message that a script ends with."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def run_script(
    main: Callable[[], int | None],
    lower: str = "the batch size",
    tell: Callable[[str], None] = print_error,
) -> NoReturn:
    """Runs a script's `main` and exits with its status; expected failures get one message and no traceback.

    Args:
        main: called without arguments; returns an exit status, None for 0.
        lower: what the user can lower when memory runs out, to end the sentence "Lower ...".
        tell: what is done with the message.
    """

    def complain(message: str, status: int = EXIT_USER_ERROR) -> int:
        sys.stdout.flush()
        tell(message)
        return status

    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        status = complain(str(error))
    except KeyboardInterrupt:
        status = complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; without this, Python complains again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error).strip() or "the system refused to give more").splitlines()[0]
        status = complain(f"out of memory: {first_line}\nLower {lower}.")
    except OSError as error:
        if (
            error.filename is None
        ):  # not about a file the user can look at: a bug, and a bug needs its traceback
            raise
        status = complain(f"{error.filename}: {error.strerror}")
    sys.exit(status)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line of bearable length; the name of its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


def in_one_line(value: Any) -> str:
    """A value found in somebody's file, for a message: its kind alone where it is not simple."""
    return f"{value!r:.80}" if isinstance(value, (str, int, float, type(None))) else type(value).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out (torch has no class for the host's)."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "not enough memory" in text or "out of memory" in text
    )


def warn(message: str) -> None:
    """One line on stderr for what does not stop the run."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


# ---- argparse value types


def _number(kind: type, low: float, high: float, rule: str, low_open: bool = False, high_open: bool = False):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}") from None
        # Written so that NaN, which compares false with everything, is refused.
        above = value > low if low_open else value >= low
        below = value < high if high_open else value <= high
        if not (above and below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    return parse


_HUGE = 2**31 - 1  # no count in these scripts is sensible above it, and torch's sizes stay in range below it
positive_int = _number(int, 1, _HUGE, "a whole number from 1 to 2147483647")
layer_count = _number(int, 1, 1000, "a whole number from 1 to 1000")  # each is built in a Python loop
non_negative_int = _number(int, 0, _HUGE, "a whole number from 0 to 2147483647")
# A system without room for that many threads ends the process, with no chance to answer.
thread_count = _number(int, 0, 1024, "a whole number from 0 to 1024")
seed_int = _number(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")  # numpy's range
finite_float = _number(float, -1e30, 1e30, "a finite number")
positive_float = _number(float, 0, 1e30, "a finite number above 0", low_open=True)
non_negative_float = _number(float, 0, 1e30, "a finite number, 0 or more")
fraction = _number(float, 0, 1, "at least 0 and below 1", high_open=True)  # dropout: 1 would erase everything
probability = _number(float, 0, 1, "above 0 and at most 1", low_open=True)


# ---- flags of every script

# What may differ when a run goes on: where it runs and how much it tells and saves, not what it computes.
RESUME_MAY_CHANGE = frozenset(
    {
        "resume",
        "cuda",
        "log_interval",
        "save_every",
        "threads",
        "runs_folder",
        "no_cuda_graph",
        "accumulate",
        "collective_timeout",
    }
)


def add_run_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the flags that have the same meaning in every training script. Returns their group."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=seed_int, default=1111, metavar="N", help="seed of all random numbers")
    group.add_argument(
        "--cuda", action="store_true", help="train on the GPU (all visible ones); without it on the CPU"
    )
    group.add_argument(
        "--threads",
        type=thread_count,
        default=0,
        metavar="N",
        help="CPU threads that torch may use; 0 = its own choice",
    )
    group.add_argument(
        "--log-interval",
        "--log_interval",
        type=positive_int,
        default=100,
        metavar="STEPS",
        help="training steps between two log entries",
    )
    group.add_argument(
        "--name", default=None, help="name of the run's folder (default: script, date and time)"
    )
    group.add_argument("--runs-folder", default="runs", metavar="FOLDER", help="where run folders are made")
    group.add_argument(
        "--save-every",
        type=non_negative_float,
        default=10.0,
        metavar="MINUTES",
        help="save last.pt this often too, besides after each epoch (if the task has any) and at the end; "
        "0 = only then",
    )
    group.add_argument(
        "--resume",
        default=None,
        metavar="RUN_FOLDER",
        help="go on with an earlier run, exactly where its last.pt stands and with its arguments",
    )
    return group


def add_precision_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that trade exactness for speed, or the reverse."""
    group.add_argument(
        "--bf16",
        action="store_true",
        help="train with products in bfloat16; softmax, norms, memory and evaluation stay in float32, and so "
        "do torch's fused recurrent layers on a GPU",
    )
    group.add_argument(
        "--strict-float32",
        action="store_true",
        help="no TF32 in the products on a GPU (they are faster with it, and rounded to 10 bits)",
    )
    group.add_argument(
        "--no-cuda-graph",
        action="store_true",
        help="launch a training step's operations one by one on a GPU, not as one CUDA graph",
    )


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, script: str, may_change: Sequence[str] = ()
) -> argparse.Namespace:
    """Parses the command line; with `--resume RUN_FOLDER` fills in the arguments of that run.

    Args:
        parser: has the flags of `add_run_flags`.
        argv: command line without the program, None for the process's own.
        script: name of the calling script, as recorded in args.json.
        may_change: names, as in the namespace, that may differ too, besides RESUME_MAY_CHANGE.

    Raises:
        UserError: the folder cannot be resumed, or the command line contradicts its arguments.
    """
    plain = parser.parse_args(argv)
    if plain.resume is None:
        return plain
    given = given_arguments(parser, argv)
    folder = Path(plain.resume)
    saved = _saved_arguments(folder, parser, script)
    allowed = RESUME_MAY_CHANGE | set(may_change)
    merged = {name: saved.get(name, default) for name, default in vars(plain).items() if name not in given}
    for name, value in given.items():
        if name not in allowed and value != saved.get(name, parser.get_default(name)):
            flag = flag_of(parser, name)
            raise UserError(
                f"{flag} cannot change when a run is resumed: {folder} was started with "
                f"{saved.get(name, parser.get_default(name))!r}, got {value!r}. Leave {flag} away, "
                "or start a new run without --resume."
            )
        merged[name] = value
    return argparse.Namespace(**merged)


def given_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The arguments that the command line itself gives, by name, without the defaults."""
    absent = object()  # argparse leaves an attribute that is there alone: what still holds this was not given
    start = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    return {
        name: value for name, value in vars(parser.parse_args(argv, start)).items() if value is not absent
    }


def flag_of(parser: argparse.ArgumentParser, name: str) -> str:
    """The flag, as typed, whose value has this name in the namespace."""
    return next(action.option_strings[0] for action in parser._actions if action.dest == name)


def warn_of_ignored(parser: argparse.ArgumentParser, given: Iterable[str], used: frozenset[str]) -> None:
    """Warns of arguments, by name, that the command line gives to an --evaluate which looks at others."""
    ignored = [flag_of(parser, name) for name in given if name not in used | {"evaluate"}]
    if ignored:
        warn(f"--evaluate ignores {', '.join(ignored)}: the model comes with its run.")


def _saved_arguments(folder: Path, parser: argparse.ArgumentParser, script: str) -> dict[str, Any]:
    """The arguments in a run folder's args.json, each checked as the command line would be."""
    if not folder.is_dir():
        raise UserError(
            f"--resume needs the folder of an earlier run, got {folder}, which is "
            f"{'a file' if folder.exists() else 'not there'}."
        )
    path = folder / "args.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved, started_by = dict(record["arguments"]), str(record["script"])
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a run folder: it has no args.json. "
            "--resume needs a folder made by an earlier run."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Start a new run."
        ) from None
    if started_by != script:
        raise UserError(
            f"{folder} is a run of {started_by}.py, this is {script}.py. Use {started_by}.py for it."
        )
    for action in parser._actions:
        if action.dest in saved and not _could_be_given(action, saved[action.dest]):
            raise UserError(
                f"{path} holds {saved[action.dest]!r} for {action.option_strings[0]}, no valid value. "
                "Was it edited? Put the old value back or start a new run."
            )
    return saved


def _could_be_given(action: argparse.Action, value: Any) -> bool:
    """Whether a flag on the command line could have this value, or has it by default."""
    if value is None:
        return action.default is None
    if action.nargs == 0:
        return isinstance(value, bool)
    if action.nargs == "+":
        return isinstance(value, list) and len(value) > 0 and all(_is_one(action, item) for item in value)
    return _is_one(action, value)


def _is_one(action: argparse.Action, value: Any) -> bool:
    try:
        parsed = action.type(str(value)) if action.type else str(value)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return parsed == value and (action.choices is None or value in action.choices)


# ---- files


def atomic_write(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file so that `path` is at every moment absent, the old whole file or the new whole file.

    Args:
        path: file to write; its folder must exist.
        write: called with a binary file open for writing, in the same folder.

    Raises:
        whatever `write` or the file system raises; the temporary file is removed, `path` is as before.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the owner's eyes only; give this one the mode that open() would have given.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0o022)  # the only portable way to read it is to set it
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the system can (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
                    raise UserError(
                        f"{folder} is there already. Choose another --name, {advice}"
                    ) from None
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


def note_resume(
    folder: Path, args: argparse.Namespace, argv: Sequence[str] | None, **facts: Any
) -> None:
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


# ---- checkpoints


def save_checkpoint(path: str | Path, contents: dict[str, Any]) -> None:
    """Writes plain data (tensors, numbers, strings, None, lists, tuples, dicts), all or nothing."""
    record = {"format": CHECKPOINT_FORMAT, "project": VERSION, "torch": str(torch.__version__), **contents}
    atomic_write(path, lambda file: torch.save(record, file))


def try_save_checkpoint(path: str | Path, contents: dict[str, Any]) -> bool:
    """`save_checkpoint`, but a failure (disk full, folder gone) only warns, and the earlier file stays."""
    try:
        save_checkpoint(path, contents)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns some failed writes into RuntimeError
        if is_out_of_memory(error):
            raise
        kept = "the one written before is kept" if Path(path).exists() else "there is none before it"
        full = ", as when the disk is full" if isinstance(error, RuntimeError) else ""
        warn(f"could not write {path} ({first_line(error)}{full}); {kept}, training goes on")
        return False
    return True


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint. Nothing in the file can run code; a damaged file is refused, not half used.

    Args:
        path: a file written by `save_checkpoint`.
        device: where its tensors go, whatever device they were saved from.

    Raises:
        UserError: the file is missing, damaged, no checkpoint of this project, or of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: it is {'a folder' if path.is_dir() else 'not there'}.")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd things in the file; what matters is an error
            contents = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
    except Exception as error:  # pickle, zip and torch raise almost anything on foreign bytes
        if is_out_of_memory(error):
            raise UserError(
                f"{path} asks for more memory than there is, in a file of {path.stat().st_size:,} bytes "
                f"({first_line(error)}). Use another checkpoint, or a machine with more memory."
            ) from None
        raise UserError(
            f"{path} is not a checkpoint of this project, or it is damaged ({first_line(error)}). "
            "Use another checkpoint."
        ) from None
    if not isinstance(contents, dict) or "format" not in contents:
        raise UserError(
            f"{path} is not a checkpoint of this project. Use a best.pt or last.pt from a run folder."
        )
    if type(contents["format"]) is not int or contents["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} has checkpoint format {in_one_line(contents['format'])}, of project version "
            f"{in_one_line(contents.get('project'))}; this version, {VERSION}, reads format "
            f"{CHECKPOINT_FORMAT}. Use the version of the project that wrote it."
        )
    for tensor in _tensors(contents):
        # A tensor may claim any size over a small storage (stride 0): harmless as it is, a bomb once copied.
        if (
            tensor.layout is not torch.strided
            or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
        ):
            raise UserError(
                f"{path} holds a tensor of shape {tuple(tensor.shape)} with less data than its shape claims. "
                "Use another checkpoint."
            )
    return contents


def load_last(folder: str | Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The contents of a run's last.pt, on a device; None for a run that was killed before its first save.

    Raises:
        UserError: as `load_checkpoint`; or there is no last.pt of a run that has come further, by its log:
            begun again, it would mix two runs in one folder.
    """
    path, log = Path(folder) / "last.pt", Path(folder) / "log.jsonl"
    if path.exists():
        return load_checkpoint(path, device)
    for event in read_log(log) if log.exists() else ():
        epoch = event.get("epoch")
        later = isinstance(epoch, (int, float)) and epoch > 1
        if later or event.get("event") in ("test", "final", "interrupt"):
            raise UserError(
                f"{folder} has no last.pt to go on from, though its log tells of work that was saved. "
                "Start a new run without --resume."
            )
    return None


_DOS_FOLDER = 0x10  # attribute of a zip entry


def _check_archive(path: Path) -> None:
    """Raises ValueError or zipfile's errors unless the file is an intact archive as torch.save makes it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch stores without compression; compressed entries could unfold to any size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries")
        # torch's reader takes an entry with this bit for a folder and hands out memory that nobody wrote to.
        if any(entry.external_attr & _DOS_FOLDER for entry in entries):
            raise ValueError("folders among the entries")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("entries larger than the file")
        damaged = archive.testzip()  # torch.load itself does not compare the checksums
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} is wrong")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in containers of any depth, each container looked at once: one may hold itself, or be held
    twice at each of many levels, which no walk through all the ways would come to the end of."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


def check_layer_counts(config: dict[str, Any], weights: dict[str, Any]) -> None:
    """ValueError for a checkpoint's config with more layers than there are weights, TypeError for no config.

    They are built one by one, and a number made up could take for ever.
    """
    if not (isinstance(config, dict) and isinstance(weights, dict)):
        raise TypeError("config and weights must be dictionaries")
    for name, value in config.items():
        if isinstance(value, int) and ("layers" in name or "blocks" in name) and value > len(weights):
            raise ValueError(f"{name} is {value}, with {len(weights)} weights in all")


# ---- randomness, devices


def seed_everything(seed: int) -> None:
    """Seeds torch (all devices), numpy and Python."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of all random number generators, as plain data for a checkpoint."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Puts back what `random_states` returned; GPU states only where the number of GPUs is the same."""
    torch.set_rng_state(states["torch"].cpu())
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def choose_device(
    cuda: bool, threads: int = 0, strict_float32: bool = False, own_gpu: int | None = None
) -> torch.device:
    """The device to compute on, said in one line.

    Args:
        cuda: the user asked for the GPU.
        threads: CPU threads for torch, 0 for its own choice.
        strict_float32: keep a GPU from rounding the products' factors to TF32.
        own_gpu: the number of the one GPU that this process is to use, the others being for processes
            beside it; None where it has them all.

    Raises:
        UserError: a GPU was asked for and there is none that torch can use, or too few for the processes.
    """
    if threads:
        torch.set_num_threads(threads)
    if not cuda:
        unused = " (a GPU is there and unused: --cuda uses it)" if torch.cuda.is_available() else ""
        print(f"device: CPU, {torch.get_num_threads()} threads{unused}", flush=True)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = (
            "torch was installed without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        )
        raise UserError(
            f"--cuda was given but {why} (torch {torch.__version__}). Leave --cuda away to run on the CPU, "
            "or install a CUDA build of torch and check that nvidia-smi lists the GPU."
        )
    torch.set_float32_matmul_precision("highest" if strict_float32 else "high")
    torch.backends.cudnn.allow_tf32 = not strict_float32
    count = torch.cuda.device_count()
    if own_gpu is not None:
        if own_gpu >= count:
            raise UserError(
                f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', f'at least {own_gpu + 1}')} processes "
                f"on this host, but torch finds {count} GPU{'s' * (count != 1)} here, and each process needs "
                f"its own. Use --nproc-per-node={count}."
            )
        torch.cuda.set_device(own_gpu)
        print(f"device: GPU {torch.cuda.get_device_name(own_gpu)}, one for each process", flush=True)
        return torch.device("cuda", own_gpu)
    print(
        f"device: {count} x GPU {torch.cuda.get_device_name(0)}"
        if count > 1
        else f"device: GPU {torch.cuda.get_device_name(0)}",
        flush=True,
    )
    return torch.device("cuda", 0)


# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Has the C library keep freed memory for the next allocation; False if it cannot be told (not glibc).

    A training step on a CPU takes and frees hundreds of megabytes in large pieces. glibc returns pieces of
    more than 32 MB to the system at once and others when enough of them are free, and the system then clears
    every page anew. `benchmark.py --give-back-memory` times what that costs. The process stays as large as it
    once was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))


def scheduled_lr(lr: float, step: int, steps: int, warmup: int = 0, cosine: bool = False) -> float:
    """The learning rate of a step, the first being 1: linear warm-up, then constant or a cosine to 0.

    It depends on nothing but the step, so a resumed run has nothing to restore.
    """
    if step <= warmup:
        return lr * step / warmup
    if not cosine:
        return lr
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def warn_of_long_warmup(warmup: int, steps: int) -> None:
    """Warns of a warm-up that the run is too short for."""
    if warmup >= steps:
        warn(
            f"--warmup {warmup:,} is no shorter than the run, {steps:,} steps: the learning rate will not "
            "reach --lr. Give a smaller --warmup or train longer."
        )


def check_model_fits(build: Callable[[], nn.Module], device: torch.device) -> None:
    """Refuses a model that cannot be trained in the memory there is, before any of it is used.

    Systems that promise more memory than they have kill a process that takes them at their word.

    Args:
        build: makes the model; called once, for shapes only.
        device: where it is to be trained.

    Raises:
        UserError: weights, gradients and Adam's two moments together exceed the device's memory.
        ValueError: as `build` does.
    """
    try:
        with torch.device("meta"):
            needed = 4 * sum(weight.numel() * weight.element_size() for weight in build().parameters())
    except (RuntimeError, OverflowError) as error:  # products of sizes beyond 64 bits
        reason = str(error).splitlines()[0]
        raise UserError(f"a model of these sizes cannot be built ({reason}). Lower its sizes.") from None
    if device.type == "cuda":
        present = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > present:
        raise UserError(
            f"a model of these sizes needs {needed / 1e9:,.1f} GB for weights, gradients and optimiser, but "
            f"{device.type} memory has {present / 1e9:,.1f} GB in all. Lower the sizes."
        )


def replica_count(gpus: int, batch_size: int) -> int:
    """Among how many of the GPUs DataParallel divides a batch.

    Its pieces are equal but for the last, so that 20 examples on 8 GPUs are 7 pieces of 3 or fewer. A replica
    without examples would be called without arguments.
    """
    count = max(1, min(gpus, batch_size))
    return -(-batch_size // -(-batch_size // count))


def wrap_data_parallel(model: nn.Module, device: torch.device, batch_size: int) -> nn.Module:
    """The model as it is, or spread over the visible GPUs along the batch, at most one GPU per example.

    Arguments and results of the model's forward have the batch (or one row per replica) as first dimension.
    """
    count = replica_count(torch.cuda.device_count(), batch_size) if device.type == "cuda" else 1
    return Replicas(model, device_ids=list(range(count))) if count > 1 else model


class Replicas(nn.DataParallel):
    """DataParallel whose replicas compute in the precision that autocast has where they are called.

    torch tells the replicas' threads that autocast is on and not its type, and a thread begins with float16.
    """

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Any, kwargs: Any) -> list[Any]:
        """Calls each replica with its part of the inputs, in a thread of its own."""
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

        def call(replica: nn.Module, *given: Any, **named: Any) -> Any:
            with torch.autocast("cuda", dtype, enabled=enabled):
                return replica(*given, **named)

        calls = [functools.partial(call, replica) for replica in replicas]
        return super().parallel_apply(calls, inputs, kwargs)


# ---- interrupts, time, progress


class Interrupts:
    """While open, Ctrl-C and SIGTERM do not break in but set `requested`, to be looked at between steps.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where signals cannot be caught,
    it does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None  # 'SIGINT' or 'SIGTERM'
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: object) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        # os.write, as print may already be at work in the code that the signal broke into.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step (Ctrl-C again: at once)\n")

    @property
    def exit_status(self) -> int:
        """128 + signal number, the shells' custom; 0 if nothing was requested."""
        return 128 + signal.Signals[self.requested].value if self.requested else 0


class Alarm:
    """Says when something timed is due: the next save, or the end of a session."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.last = time.monotonic()

    def due(self) -> bool:
        """True once per period, never when the period is 0."""
        if not self.seconds or time.monotonic() - self.last < self.seconds:
            return False
        self.reset()
        return True

    def reset(self) -> None:
        """Starts a new period now."""
        self.last = time.monotonic()


# Nothing to be seen for so many seconds is worth a line that says how long it will be.
LONG_SILENCE = 10.0


class FirstStep:
    """After a session's first step, says what to expect where no line would come for long.

    Its clock starts when it is made. On a GPU it says nothing: the first step sets libraries up there, and
    the host does not wait for its end.
    """

    def __init__(self, device: torch.device) -> None:
        self.due = device.type == "cpu"
        self.start = time.perf_counter()

    def tell(self, steps_to_line: int, steps: int, what: str) -> None:
        """To be called after each step, of which only the first counts.

        Args:
            steps_to_line: how many steps there are yet until a line comes.
            steps: how many `what` has in all.
        """
        if not self.due:
            return
        self.due = False
        seconds = time.perf_counter() - self.start
        if seconds * steps_to_line >= LONG_SILENCE:
            say(
                f"the first step took {duration(seconds)}: at this pace the next line comes in about "
                f"{duration(seconds * steps_to_line)}, and {what} of {steps:,} steps takes about "
                f"{duration(seconds * steps)}"
            )


def duration(seconds: float) -> str:
    """A time as people say it: '0.25 s', '90 s', '7.5 min', '31 h'."""
    size, unit = next(
        ((size, unit) for size, unit in ((3600, "h"), (60, "min")) if seconds >= 2 * size), (1, "s")
    )
    value = seconds / size
    return f"{value:,.{2 if value < 1 else 1 if value < 10 else 0}f} {unit}"


class Progress:
    """A progress bar on a terminal, plain lines elsewhere.

    Args:
        total: steps in all.
        done: steps already taken (a resumed run).
        label: text before the bar and before every plain line.
        quiet: no plain lines for the reports (a short evaluation), the bar only.
    """

    def __init__(
        self, total: int, label: str, done: int = 0, unit: str = "batch", quiet: bool = False
    ) -> None:
        self.total, self.done, self.label, self.quiet = total, done, label, quiet
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit=unit,
            dynamic_ncols=True,
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def advance(self, steps: int = 1) -> None:
        """Counts steps."""
        self.done += steps
        self.bar.update(steps)

    def report(self, text: str) -> None:
        """Shows numbers: beside the bar, or as a line."""
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif not self.quiet:
            print(f"{self.label} {self.done:>{len(str(self.total))}}/{self.total}  {text}", flush=True)


def say(text: str) -> None:
    """Prints a line without tearing a progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
