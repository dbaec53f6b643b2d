"""What a script says and hears: messages, errors, progress, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from tqdm import tqdm

EXIT_USER_ERROR = 2  # what argparse uses too
EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shells' custom

# ---- errors, exit status


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
