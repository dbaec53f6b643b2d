"""What scripts print, how they end, and the signals that stop them."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from tqdm import tqdm

EXIT_USER_ERROR = 2  # as argparse exits
EXIT_INTERRUPTED = 128 + signal.SIGINT
# Schedulers send SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU before they end a job; a closed terminal sends SIGHUP.
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
]

# In messages of RuntimeErrors: torch has no exception class for these.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class UserError(Exception):
    """A mistake that the user can correct. The message says what was wrong, what was found and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if it has none.

    If that line ends in a colon, as in errors of load_state_dict, the next line is included.
    """
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(map(str.strip, lines[: 1 + lines[0].endswith(":")]))[:250]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or one in its context, reports that host or device memory ran out."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---- the script's main program


def run_script(
    main: Callable[[], int | None],
    lower: str = "the batch size",
    report: Callable[[str], None] = lambda text: print(f"error: {text}", file=sys.stderr, flush=True),
) -> NoReturn:
    """Run a script's `main` and exit with its status. Expected failures print one message, no traceback.

    Args:
        main: called without arguments; returns an exit status, None for 0.
        lower: what the user can lower when memory runs out; completes the sentence "Lower ...".
        report: receives the message.
    """
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        status = main() or 0
    except UserError as error:
        status = EXIT_USER_ERROR
        report(str(error))
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
        report("interrupted")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status = EXIT_USER_ERROR
        report(f"out of memory: {first_line(error)}\nLower {lower}.")
    except OSError as error:
        if error.filename is None:  # a bug: keep its traceback
            raise
        status = EXIT_USER_ERROR
        report(f"{error.filename}: {error.strerror}")
    sys.stdout.flush()
    sys.exit(status)


class LastingStream:
    """Standard output or error whose loss does not end the script.

    Writing fails after a terminal was closed, to a pipe without a reader or on a full disk. From the first
    failure on, all output is discarded; log.jsonl has the numbers.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)
        with contextlib.suppress(AttributeError):  # not a file, as in tests
            self.stream.reconfigure(errors="backslashreplace")  # a letter that the terminal cannot show

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write the text, or discard it if the stream is lost."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or discard what cannot be written."""
        self._try(self.stream.flush)

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())  # later writes, and the flush at exit, succeed
            os.close(null)
            if self is sys.stdout:
                warn(f"standard output is lost ({error.strerror}); the script continues without it")


# ---- messages


def say(text: str) -> None:
    """Print a line without breaking a progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def warn(message: str) -> None:
    """Print a warning on standard error without breaking a progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def command(script: str, *arguments: object, launcher: str = "python") -> str:
    """Return a shell command that runs one of this project's scripts from the current folder."""
    path = os.path.relpath(Path(__file__).resolve().parent.parent / f"{script}.py")
    return f"{launcher} {shlex.join([path, *map(str, arguments)])}"


class Progress:
    """A progress bar on a terminal, plain lines elsewhere.

    Args:
        total: number of steps.
        label: text before the bar and before every line.
        done: steps already taken, in a resumed run.
    """

    def __init__(self, total: int, label: str, done: int = 0) -> None:
        self.total, self.done, self.label = total, done, label
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            dynamic_ncols=True,
            leave=False,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def advance(self, steps: int = 1) -> None:
        """Count steps."""
        self.done += steps
        self.bar.update(steps)

    def report(self, short: str, line: str | None = None) -> None:
        """Show the short text beside the bar; without a bar, print the line (default: the short text)."""
        if not self.bar.disable:
            self.bar.set_postfix_str(short)
        else:
            count = f"{self.done:>{len(str(self.total))}}/{self.total}"
            print(f"{self.label} {count}  {line or short}", flush=True)


# ---- signals, time


class Interrupts:
    """A context in which stop signals set `requested` and do not end the process.

    Read `requested` between steps. A second Ctrl-C raises KeyboardInterrupt at once. Except for SIGINT, a
    signal that was ignored before stays ignored, as SIGHUP does under nohup.

    Attributes:
        requested: name of the last signal, or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # only there can signals be caught
            for number in STOP_SIGNALS:
                if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                    continue
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
        # Not print, which the signal may have interrupted.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step (press Ctrl-C again to stop at once)\n")

    @property
    def exit_status(self) -> int:
        """128 + the number of the signal, as in shells; 0 without a signal."""
        return 128 + signal.Signals[self.requested].value if self.requested else 0


class Alarm:
    """A timer that is due once per period, as for saving. With a period of 0 minutes it is never due."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.last = time.monotonic()

    def due(self) -> bool:
        """Return whether the period has passed, and if so start the next one."""
        if not self.seconds or time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True
