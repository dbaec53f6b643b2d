"""Messages, exit status, lost output, progress bars, signals, timers."""

import signal
import subprocess
import sys
from pathlib import Path

from training import console
from training.console import UserError

import pytest
import torch


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    """Undo what run_script does to the standard streams."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(console.warnings, "formatwarning", console.warnings.formatwarning)


# ---- how a script ends


def exit_of(capsys, failure, lower="the width"):
    """Return exit status and standard error of a script that returns, or raises, `failure`."""

    def main():
        if isinstance(failure, BaseException):
            raise failure
        return failure

    with pytest.raises(SystemExit) as exit:
        console.run_script(main, lower)
    return exit.value.code, capsys.readouterr().err


def test_expected_failures_print_one_message(capsys):
    assert exit_of(capsys, None) == (0, "")
    assert exit_of(capsys, 3) == (3, "")
    assert exit_of(capsys, UserError("bad width")) == (2, "error: bad width\n")
    assert exit_of(capsys, KeyboardInterrupt()) == (130, "error: interrupted\n")
    assert exit_of(capsys, OSError(28, "No space left", "x.pt")) == (2, "error: x.pt: No space left\n")


def allocate_too_much():
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        allocate_too_much(),
    ],
)
def test_memory_that_runs_out_names_what_to_lower(capsys, failure):
    code, text = exit_of(capsys, failure)
    assert code == 2 and text.startswith("error: out of memory: ") and text.endswith("\nLower the width.\n")


@pytest.mark.parametrize("bug", [RuntimeError("shapes differ"), ValueError("x"), OSError("no file named")])
def test_bugs_keep_their_traceback(bug):
    with pytest.raises(type(bug)):
        console.run_script(lambda: (_ for _ in ()).throw(bug))


# ---- output


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from training import console
def main():
    for number in range(3):
        console.say("a line")
        console.warn("a warning")
    return 5
console.run_script(main)
"""


def test_exit_status_of_a_script_without_output():
    """The interpreter flushes the streams once more at exit, which must not fail."""
    code = SCRIPT.format(root=str(Path(console.__file__).parent.parent))
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" > /dev/full', sys.executable, code], stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 5
    assert "Traceback" not in done.stderr and done.stderr.count("a warning") == 3


def test_commands_are_quoted_and_run_from_the_present_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = console.command("train_rmc", "--resume", Path("runs of mine/$x"))
    answer = subprocess.run(f'for word in {text}; do echo "$word"; done', shell=True, capture_output=True)
    start, script, *arguments = answer.stdout.decode().splitlines()
    assert start == "python" and arguments == ["--resume", "runs of mine/$x"]
    assert Path(script).resolve() == Path(console.__file__).resolve().parent.parent / "train_rmc.py"


# ---- progress


def test_progress_prints_lines_without_a_terminal(capsys):
    with console.Progress(120, "epoch 1", done=7) as progress:
        progress.advance(3)
        progress.report("loss 1.5")
        progress.advance()
        progress.report("loss 1.4", "loss 1.4 | 3 ms")
    lines = "epoch 1  10/120  loss 1.5\nepoch 1  11/120  loss 1.4 | 3 ms\n"
    assert capsys.readouterr() == (lines, "")


# ---- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_stop_signals_are_noted_for_the_next_step(name):
    number = signal.Signals[name]

    def before(*args):  # the default would end the tests
        pytest.fail(f"{name} was not caught")

    original = signal.signal(number, before)
    with console.Interrupts() as interrupts:
        assert interrupts.requested is None and interrupts.exit_status == 0
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert interrupts.requested == name and interrupts.exit_status == 128 + number
    assert signal.signal(number, original) is before


def test_ignored_signals_stay_ignored():
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with console.Interrupts() as interrupts:
        signal.raise_signal(signal.SIGHUP)
        assert interrupts.requested is None
    signal.signal(signal.SIGHUP, before)


def test_second_ctrl_c_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), console.Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested == "SIGINT" and interrupts.exit_status == 130
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this step" in capfd.readouterr().err


# ---- time


def test_alarm_is_due_once_per_period_even_after_sleep(monkeypatch):
    """After a laptop has slept from minute 25 to 505, one save is due; the wall clock plays no part."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.time, "time", lambda: -1e9)
    alarm, never, saved = console.Alarm(10), console.Alarm(0), []
    for minute in [*range(25), *range(505, 530)]:
        now[0] = 60.0 * minute
        if alarm.due():
            saved.append(minute)
        assert not never.due()
    assert saved == [10, 20, 505, 515, 525]
