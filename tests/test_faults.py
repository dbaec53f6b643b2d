"""Whole runs in trouble: lost output, signals, full disks, vanished folders, altered files."""

import contextlib
import functools
import os
import random
import resource
import shlex
import signal
import sys
import threading

from training import checkpoints, console, devices, runs

import pytest
import torch
from conftest import write_corpus
from same_runs import after_step, assert_same_checkpoint, assert_same_run, numbers

import train_rnn
from tasks import language_modeling

# 2379 targets in 14 streams of 170 or fewer: 12 windows of 15 in an epoch, the last of 5.
STEPS = 12
LOOP = shlex.split("--batch-size 14 --bptt 15 --lr 0.01 --log-interval 5 --eval-batch-size 3 --epochs 2")
SIZES = shlex.split("--emsize 12 --nhid 7 --nlayers 2")  # with dropout, for which random states matter
ALWAYS = ["--save-every", "0.0000001"]  # after each step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The folder of a run that was not disturbed."""
    root = tmp_path_factory.mktemp("whole")
    assert train(corpus, root) == 0
    return root / "run"


def command(corpus, root, *argv):
    """Return the command line of a run named 'run' in `root`."""
    return [*SIZES, *LOOP, "--data", str(corpus), "--runs-folder", str(root), "--name", "run", *argv]


def train(corpus, root, *argv):
    return train_rnn.main(command(corpus, root, *argv))


# ---- output and signals


@pytest.mark.parametrize("output, ctrl_c", [("/dev/full", False), ("| head", False), ("| tee, Ctrl-C", True)])
def test_lost_output_does_not_end_a_run(output, ctrl_c, corpus, whole, tmp_path, monkeypatch):
    """Nobody reads the output; all numbers are logged nevertheless."""
    reader, out = os.pipe()
    os.close(reader)
    child = os.fork()
    if child == 0:
        end = 70
        try:
            os.dup2(os.open(output, os.O_WRONLY) if output == "/dev/full" else out, 1)
            os.dup2(out if ctrl_c else os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            if ctrl_c:
                after_step(monkeypatch, STEPS + 3)
            console.run_script(lambda: train(corpus, tmp_path))
        except SystemExit as exit:
            end = exit.code
        finally:
            sys.stderr.flush()
            os._exit(end)
    os.close(out)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130 * ctrl_c
    if ctrl_c:
        assert train_rnn.main(["--resume", str(tmp_path / "run")]) == 0
    else:
        assert (tmp_path / "stderr").read_text().count("standard output is lost") == 1
    assert_same_run(whole, tmp_path / "run")


def test_run_killed_again_and_again_ends_as_if_uninterrupted(corpus, whole, tmp_path, monkeypatch):
    run, draw, kills = tmp_path / "run", random.Random(5), 0
    for attempt in range(9):
        last = run / "last.pt"
        saved = checkpoints.load_checkpoint(last)["position"]["step"] if last.exists() else 0
        assert saved or kills == 0  # every kill leaves a checkpoint
        delay = draw.uniform(0, 0.01)  # seconds; a kill may hit the write of a checkpoint
        child = os.fork()
        if child == 0:
            try:
                if attempt < 8:
                    kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
                    later = threading.Timer(delay, kill).start
                    after_step(monkeypatch, saved + 2, later if attempt % 2 else kill)
                start = ["--resume", str(run)] if saved else command(corpus, tmp_path, *ALWAYS)
                os._exit(train_rnn.main(start))
            finally:
                os._exit(70)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
    assert status == 0 and kills > 0
    assert_same_run(whole, run)


@pytest.mark.parametrize("owner, work", [(language_modeling, "evaluate"), (checkpoints, "save_checkpoint")])
def test_signal_during_evaluation_or_saving(owner, work, corpus, whole, tmp_path, monkeypatch):
    original = getattr(owner, work)

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(owner, work, original)
        signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, work, interrupted)
    assert train(corpus, tmp_path, *ALWAYS) == 143
    assert train_rnn.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(whole, tmp_path / "run")


def test_threads_are_recorded_and_kept(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    for cores, start in ((3, command(corpus, tmp_path)), (4, ["--resume", str(tmp_path / "run")])):
        monkeypatch.setattr(devices, "available_cores", lambda: cores)  # noqa: B023
        assert train_rnn.main(start) == 0
        assert "device: CPU, 3 threads" in capsys.readouterr().out
    assert runs.read_json(tmp_path / "run" / "args.json")["arguments"]["threads"] == 3


# ---- disks, other processes


@contextlib.contextmanager
def files_of_at_most(size):
    """Make the kernel refuse to write more than this many bytes to a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_that_is_full_for_a_while_changes_nothing(corpus, whole, tmp_path, monkeypatch, capsys):
    save, steps = torch.save, []

    def save_on_disk(contents, file):
        steps.append((contents.get("position") or contents["scores"])["step"])
        if not STEPS <= steps[-1] < STEPS + 6:
            return save(contents, file)
        path = tmp_path / "run" / "last.pt"
        before = path.read_bytes()
        try:
            with files_of_at_most(3000):
                save(contents, file)
        finally:
            assert path.read_bytes() == before

    monkeypatch.setattr(torch, "save", save_on_disk)
    assert train(corpus, tmp_path, *ALWAYS) == 0
    err = capsys.readouterr().err
    assert err.count("could not write") == sum(STEPS <= step < STEPS + 6 for step in steps) > 6
    assert "last.pt (" in err and "best.pt (" in err
    # The best model of the first epoch could not be written, and that of the second was better.
    assert checkpoints.load_checkpoint(whole / "best.pt")["scores"]["epoch"] == 2
    assert_same_checkpoint(whole / "best.pt", tmp_path / "run" / "best.pt")
    assert numbers(whole) == numbers(tmp_path / "run")
