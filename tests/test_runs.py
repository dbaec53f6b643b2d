"""Run folders, logs, checkpoints, resumed arguments, interrupts: what every script relies on."""

import argparse
import io
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from training import checkpoints, console, devices, files, flags, runs, schedule
from training.console import UserError


def sample_contents():
    return {"weights": torch.arange(7, dtype=torch.float32), "step": 3, "words": ["a", "ü"], "loss": math.inf}


# ---- atomic files


def test_atomic_write_replaces_whole_files_only(tmp_path):
    path = tmp_path / "file"
    files.atomic_write(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == b"old"  # a reader at this moment sees the old file
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.atomic_write(path, half)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]  # no temporary file stays
    files.atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_atomic_write_gives_the_usual_file_mode(tmp_path):
    files.atomic_write(tmp_path / "atomic", lambda file: file.write(b""))
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---- checkpoints


def test_checkpoint_round_trip_is_plain_data(tmp_path):
    path = tmp_path / "c.pt"
    checkpoints.save_checkpoint(path, {**sample_contents(), "random": devices.random_states()})
    again = checkpoints.load_checkpoint(path)
    assert torch.equal(again["weights"], sample_contents()["weights"])
    assert (again["step"], again["words"], again["loss"]) == (3, ["a", "ü"], math.inf)
    assert torch.load(path, weights_only=True)["format"] == checkpoints.CHECKPOINT_FORMAT


def test_any_changed_or_missing_byte_is_refused_or_harmless(tmp_path):
    """Bit flips over the whole file: the contents as saved, or a UserError, never other contents."""
    path, damaged = tmp_path / "c.pt", tmp_path / "damaged.pt"
    checkpoints.save_checkpoint(path, sample_contents())
    whole = path.read_bytes()
    draw, refused = random.Random(3), 0
    for place in draw.sample(range(len(whole)), 150):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        damaged.write_bytes(flipped)
        try:
            contents = checkpoints.load_checkpoint(damaged)
        except UserError as error:
            refused += 1
            assert str(damaged) in str(error) and "\n" not in str(error)
        else:
            assert torch.equal(contents["weights"], sample_contents()["weights"])
            assert {key: contents[key] for key in ("step", "words")} == {"step": 3, "words": ["a", "ü"]}
    assert refused > 20
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        with pytest.raises(UserError, match="Use another checkpoint"):
            checkpoints.load_checkpoint(damaged)


def test_flipped_bit_in_a_weight_is_found(tmp_path):
    """torch.load alone would return the wrong number."""
    path = tmp_path / "c.pt"
    weights = torch.full((50,), 1.5)
    checkpoints.save_checkpoint(path, {"weights": weights})
    data = bytearray(path.read_bytes())
    data[data.index(weights.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], weights)
    with pytest.raises(UserError, match="checksum"):
        checkpoints.load_checkpoint(path)


class Trap:
    """Pickles to something that leaves a mark when it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("writer", ["torch", "legacy torch", "pickle"])
def test_fault_7_checkpoints_are_no_pickled_objects_and_run_no_code(tmp_path, writer):
    path, mark = tmp_path / "evil.pt", tmp_path / "mark"
    contents = {"format": 1, "model": Trap(mark)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        checkpoints.load_checkpoint(path)
    assert not mark.exists()


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "c.pt"
    for contents in (b"", b"hello", b"\x80\x04.", b"PK\x03\x04" + bytes(100), os.urandom(5000)):
        path.write_bytes(contents)
        with pytest.raises(UserError, match="not a checkpoint"):
            checkpoints.load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoints.load_checkpoint(path)
    torch.save({"format": 99, "project": "9.9"}, path)
    with pytest.raises(UserError, match="format 99.*version '9.9'"):
        checkpoints.load_checkpoint(path)
    with pytest.raises(UserError, match="it is a folder"):
        checkpoints.load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="it is not there"):
        checkpoints.load_checkpoint(tmp_path / "none.pt")


def test_tensor_bombs_are_refused(tmp_path):
    path, packed = tmp_path / "c.pt", tmp_path / "packed.pt"
    torch.save({"format": 1, "model": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(UserError, match="less data than its shape claims"):
        checkpoints.load_checkpoint(path)
    checkpoints.save_checkpoint(path, {"model": torch.zeros(2**20)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    assert packed.stat().st_size < path.stat().st_size / 100
    with pytest.raises(UserError, match="compressed"):
        checkpoints.load_checkpoint(packed)


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_failed_checkpoint_write_warns_and_keeps_the_earlier_one(tmp_path, monkeypatch, capsys, failure):
    path = tmp_path / "last.pt"
    assert checkpoints.try_save_checkpoint(path, {"step": 1})

    def fail(contents, file):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    assert not checkpoints.try_save_checkpoint(path, {"step": 2})
    assert "warning: could not write" in capsys.readouterr().err
    assert checkpoints.load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_checkpoint_into_a_vanished_folder_only_warns(tmp_path, capsys):
    assert not checkpoints.try_save_checkpoint(tmp_path / "gone" / "last.pt", {"step": 1})
    assert "there is none before it" in capsys.readouterr().err


# ---- run folders


def test_fault_7_run_folders_have_plain_names_and_are_never_reused(tmp_path):
    """Runs started in the same second get folders of their own; no ':' and no spaces."""
    folders = []
    threads = [
        threading.Thread(
            target=lambda: folders.append(runs.create_run_folder(tmp_path / "runs", None, "train_rmc"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 8
    for folder in folders:
        assert folder.is_dir() and folder.name.startswith("train_rmc-2")
        assert not set(folder.name) & set(": /\\")


def test_names_that_are_taken_or_not_plain(tmp_path):
    assert runs.create_run_folder(tmp_path, "mine-1.0", "train_rmc").name == "mine-1.0"
    with pytest.raises(UserError, match="is there already"):
        runs.create_run_folder(tmp_path, "mine-1.0", "train_rmc")
    for name in ("", ".", "..", "a/b", "a:b", "a b", "-x", ".hidden", "x" * 101, "a\n"):
        with pytest.raises(UserError, match="--name"):
            runs.create_run_folder(tmp_path, name, "train_rmc")
    assert os.listdir(tmp_path) == ["mine-1.0"]


def test_a_folder_without_a_run_is_not_to_be_resumed(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="or remove that folder: it has no args.json"):
        runs.create_run_folder(tmp_path, "a", "train_rmc")
    (tmp_path / "a" / "args.json").write_text("{}")
    with pytest.raises(UserError, match="go on with that run: --resume"):
        runs.create_run_folder(tmp_path, "a", "train_rmc")


def test_runs_folder_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot make a run folder"):
        runs.create_run_folder(tmp_path / "runs", None, "train_rmc")


def test_newest_run_is_that_with_the_latest_best_model_of_the_scripts(tmp_path):
    assert runs.newest_run(tmp_path / "none") is None
    for age, (name, script) in enumerate(
        [("a", "train_rmc"), ("b", "train_rnn"), ("c", "train_nth_farthest")]
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps({"script": script}))
        (tmp_path / name / "best.pt").write_bytes(b"")
        os.utime(tmp_path / name / "best.pt", (1000 + age, 1000 + age))
    (tmp_path / "no-model").mkdir()
    assert runs.newest_run(tmp_path) == tmp_path / "c"
    assert runs.newest_run(tmp_path, ("train_rmc", "train_rnn")) == tmp_path / "b"
    assert runs.newest_run(tmp_path, ("other",)) is None


def test_discarding_a_run_folder_leaves_strange_files(tmp_path):
    for name in ("empty", "used"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text("{}")
        (tmp_path / name / ".last.pt.abc.tmp").touch()
        (tmp_path / name / runs.LOCK).touch()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    runs.discard_run_folder(tmp_path / "empty")
    runs.discard_run_folder(tmp_path / "used")
    assert not (tmp_path / "empty").exists()
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"


# ---- log


def test_log_is_one_object_per_line_and_has_no_nan(tmp_path):
    log = runs.RunLog(tmp_path / "log.jsonl")
    log.write("train", step=1, loss=math.nan, text="ü")
    log.write("valid", step=1, loss=math.inf, ppl=2.5)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"event": "train", "step": 1, "loss": None, "text": "ü"}
    assert json.loads(lines[1]) == {"event": "valid", "step": 1, "loss": None, "ppl": 2.5}


def test_log_survives_a_half_line(tmp_path):
    path = tmp_path / "log.jsonl"
    runs.RunLog(path).write("train", step=1)
    with open(path, "a") as file:
        file.write('{"event": "tra')  # killed here
    runs.RunLog(path).write("train", step=2)
    assert [event["step"] for event in runs.read_log(path)] == [1, 2]


def test_resumed_log_has_every_step_once(tmp_path):
    log = runs.RunLog(tmp_path / "log.jsonl")
    for event, step, loss in [("train", 1, 1.1), ("train", 2, 2.1), ("valid", 2, 7.1), ("train", 3, 3.1)]:
        log.write(event, step=step, loss=loss)
    log.write("resume", step=2)
    log.write("valid", step=2, loss=7.2)  # saved before it was validated: validated and logged again
    log.write("train", step=3, loss=3.2)
    events = [(event["event"], event["step"], event.get("loss")) for event in runs.read_log(log.path)]
    assert events == [
        ("train", 1, 1.1),
        ("train", 2, 2.1),
        ("valid", 2, 7.2),
        ("resume", 2, None),
        ("train", 3, 3.2),
    ]


def test_failing_log_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    log = runs.RunLog(tmp_path / "run" / "log.jsonl")
    (tmp_path / "run" / "log.jsonl").unlink()
    (tmp_path / "run").rmdir()
    log.write("train", step=1)
    assert "training goes on" in capsys.readouterr().err


# ---- arguments


def make_parser():
    parser = argparse.ArgumentParser(formatter_class=flags.HelpFormatter)
    parser.add_argument("--width", type=flags.positive_int, default=5)
    parser.add_argument("--sizes", type=flags.positive_int, nargs="+", default=None)
    parser.add_argument("--style", choices=("unit", "memory"), default="unit")
    parser.add_argument("--epochs", type=flags.positive_int, default=3)
    flags.add_run_flags(parser)
    return parser


@pytest.fixture
def started(tmp_path):
    """A run folder with arguments that are not the defaults."""
    argv = ["--width", "7", "--sizes", "2", "3", "--style", "memory", "--seed", "9"]
    folder = runs.create_run_folder(tmp_path, "run", "script")
    runs.write_arguments(
        folder, "script", flags.parse_arguments(make_parser(), argv, "script"), argv, parameters=11
    )
    return folder


def resume(folder, *argv, script="script"):
    return flags.parse_arguments(
        make_parser(), ["--resume", str(folder), *argv], script, may_change=("epochs",)
    )


def test_args_json_records_arguments_versions_and_hardware(started):
    record = json.loads((started / "args.json").read_text())
    assert record["arguments"]["width"] == 7 and record["parameters"] == 11
    assert record["command_line"][:2] == ["--width", "7"]
    assert record["environment"]["torch"] == torch.__version__
    assert {"python", "numpy", "cpu", "threads", "gpus", "commit"} <= set(record["environment"])


def test_resumed_arguments_are_those_of_the_run(started):
    args = resume(started)
    assert (args.width, args.sizes, args.style, args.seed, args.epochs) == (7, [2, 3], "memory", 9, 3)
    args = resume(started, "--width", "7", "--epochs", "8", "--threads", "1", "--log-interval", "4")
    assert (args.width, args.epochs, args.threads, args.log_interval) == (7, 8, 1, 4)
    runs.note_resume(started, args, ["--epochs", "8"])
    assert resume(started).epochs == 8  # resumed once more, it goes as far as it was last told to
    assert json.loads((started / "args.json").read_text())["resumed"][0]["command_line"] == ["--epochs", "8"]


def test_resuming_with_other_arguments_is_refused(started):
    for argv in (
        ["--width", "5"],
        ["--seed", "1111"],
        ["--style", "unit"],
        ["--sizes", "2"],
        ["--name", "other"],
    ):
        with pytest.raises(UserError, match=f"{argv[0]} cannot change"):
            resume(started, *argv)


def test_folders_that_cannot_be_resumed(started, tmp_path):
    with pytest.raises(UserError, match="run of script.py, this is other.py"):
        resume(started, script="other")
    with pytest.raises(UserError, match="not there"):
        resume(tmp_path / "none")
    with pytest.raises(UserError, match="a file"):
        resume(started / "args.json")
    with pytest.raises(UserError, match="no args.json"):
        resume(tmp_path)
    record = json.loads((started / "args.json").read_text())
    for bad in (
        {"width": -1},
        {"width": "x"},
        {"width": [7]},
        {"style": "none"},
        {"cuda": 1},
        {"sizes": [2, 0]},
        {"seed": {}},
        {"width": None},
        {"sizes": []},
        {"save_every": math.nan},
    ):
        (started / "args.json").write_text(
            json.dumps({**record, "arguments": {**record["arguments"], **bad}})
        )
        with pytest.raises(UserError, match="no valid value"):
            resume(started)
    for text in ("", "[]", "{}", '{"script": "script", "arguments": 3}', "\0"):
        (started / "args.json").write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            resume(started)


def parses(kind, text):
    try:
        return kind(text)
    except argparse.ArgumentTypeError as error:
        assert str(error).startswith("must be ") and repr(text)[1:-1] in str(error)
        return None


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (
            flags.positive_int,
            ["1", "2147483647"],
            ["0", "-1", "1.5", "x", "", "nan", "inf", "2147483648", "1e3"],
        ),
        (flags.non_negative_int, ["0", "5"], ["-1", "0.0"]),
        (flags.seed_int, ["0", "4294967295"], ["-1", "4294967296"]),
        (flags.finite_float, ["0", "-3.5"], ["nan", "inf", "-inf", "1e999", "x"]),
        (flags.positive_float, ["1e-9", "3"], ["0", "-1", "nan", "inf"]),
        (flags.non_negative_float, ["0", "3"], ["-0.1", "nan", "inf"]),
        (flags.fraction, ["0", "0.99"], ["1", "-0.1", "nan"]),
        (flags.probability, ["0.01", "1"], ["0", "1.01", "nan"]),
    ],
)
def test_argument_types(kind, good, bad):
    assert [parses(kind, text) for text in good] == [float(text) for text in good]
    assert [parses(kind, text) for text in bad] == [None] * len(bad)


def test_help_shows_defaults_that_say_something():
    parser = make_parser()
    parser.add_argument("--bias", type=flags.finite_float, default=0.0, help="a bias")
    text = parser.format_help()
    assert "a bias (default: 0.0)" in text
    assert "(default: 1111)" in text and "(default: None)" not in text and "(default: False)" not in text


# ---- randomness, devices


def test_random_states_bring_back_every_generator():
    devices.seed_everything(5)
    np.random.standard_normal()  # leaves a cached second value, which is part of the state
    states = devices.random_states()

    def draws():
        return (
            torch.rand(3).tolist(),
            np.random.standard_normal(3).tolist(),
            [random.gauss(0, 1) for _ in range(3)],
        )

    expected = draws()
    devices.seed_everything(6)
    assert draws() != expected
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    devices.restore_random_states(torch.load(buffer, weights_only=True))
    assert draws() == expected


def test_cuda_without_a_gpu_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--cuda was given but"):
        devices.choose_device(True)


def test_unused_gpu_is_a_hint(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.choose_device(False) == torch.device("cpu")
    assert "unused: --cuda uses it" in capsys.readouterr().out


# ---- interrupts, errors


def test_first_interrupt_is_a_flag_and_the_second_breaks_in(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), console.Interrupts() as interrupts:
        assert interrupts.requested is None and interrupts.exit_status == 0
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested == "SIGINT" and interrupts.exit_status == 130
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping" in capfd.readouterr().err


def test_sigterm_is_a_flag_and_stays_one():
    with console.Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.requested == "SIGTERM" and interrupts.exit_status == 143


def exit_of(capsys, failure, lower="the width"):
    def main():
        if isinstance(failure, BaseException):
            raise failure
        return failure

    with pytest.raises(SystemExit) as exit:
        console.run_script(main, lower)
    return exit.value.code, capsys.readouterr().err


def test_expected_failures_end_in_one_message(capsys):
    assert exit_of(capsys, None) == (0, "")
    assert exit_of(capsys, 3) == (3, "")
    assert exit_of(capsys, UserError("bad width")) == (2, "error: bad width\n")
    assert exit_of(capsys, KeyboardInterrupt())[0] == 130
    code, text = exit_of(capsys, torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert code == 2 and text.endswith("Lower the width.\n")
    code, text = exit_of(capsys, MemoryError())
    assert code == 2 and "out of memory" in text
    assert exit_of(capsys, OSError(28, "No space left", "x.pt")) == (2, "error: x.pt: No space left\n")


def test_host_memory_that_runs_out_is_known_for_what_it_is(capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert exit_of(capsys, caught.value)[0] == 2


@pytest.mark.parametrize("bug", [RuntimeError("shapes differ"), ValueError("x"), OSError("no file in it")])
def test_bugs_keep_their_traceback(bug):
    with pytest.raises(type(bug)):
        console.run_script(lambda: (_ for _ in ()).throw(bug))


def test_alarm_rings_once_per_period(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    alarm, never = console.Alarm(2), console.Alarm(0)
    rings = []
    for second in (119, 121, 220, 221, 339, 341, 9999):
        now[0] = 100.0 + second
        rings.append(alarm.due())
        assert not never.due()
    assert rings == [False, True, False, False, True, False, True]


def test_plain_lines_where_there_is_no_terminal(capsys):
    with console.Progress(120, "epoch 1", done=7) as progress:
        progress.advance(3)
        progress.report("loss 1.5")
    with console.Progress(9, "valid", quiet=True) as progress:
        progress.report("nothing")
    assert capsys.readouterr() == ("epoch 1  10/120  loss 1.5\n", "")


def test_a_warmup_that_outlasts_the_run_is_warned_of(capsys):
    schedule.warn_of_long_warmup(0, 1)
    schedule.warn_of_long_warmup(9, 10)
    assert capsys.readouterr().err == ""
    schedule.warn_of_long_warmup(500, 54)
    assert "--warmup 500 is no shorter than the run, 54 steps" in capsys.readouterr().err


# ---- memory


FAULTS = """
import resource, torch
from training import devices

def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(48 << 20, dtype=torch.uint8)  # more than glibc would keep by its own rule
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(1)
handed_back = faults(10)
if devices.keep_freed_memory():
    faults(20)  # glibc needs some aligned pieces before it finds a freed one that fits
    print(handed_back, faults(10))
"""


def test_freed_memory_is_kept_for_the_next_allocation():
    # In a process of its own: what other tests have left in the heap decides where pieces fit.
    home = Path(runs.__file__).parent
    command = [sys.executable, "-c", FAULTS]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=home)
    if not answer.stdout:
        pytest.skip("only glibc can be told")
    handed_back, kept = map(int, answer.stdout.split())
    assert kept < handed_back / 5, "pages were cleared anew"


def test_times_are_said_as_people_say_them():
    times = (0.254, 7.04, 90, 450, 5400, 7200, 4e6)
    said = ["0.25 s", "7.0 s", "90 s", "7.5 min", "90 min", "2.0 h", "1,111 h"]
    assert [console.duration(seconds) for seconds in times] == said


@pytest.mark.parametrize("kind, first, steps_to_line, told", [
    ("cpu", 3.0, 4, "first step took 3.0 s: at this pace the next line comes in about 12 s, and an epoch of "
                    "1,200 steps takes about 60 min"),
    ("cpu", 3.0, 3, ""),
    ("cuda", 3.0, 1000, ""),
])
def test_the_first_step_says_what_to_expect_if_nothing_else_would_be_seen_for_long(
    kind, first, steps_to_line, told, monkeypatch, capsys
):
    now = [50.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    step = console.FirstStep(torch.device(kind))
    now[0] += first
    step.tell(steps_to_line, 1200, "an epoch")
    said = capsys.readouterr().out
    assert told in said and bool(said) == bool(told) and said.count("\n") == bool(told)
    now[0] += 1000
    step.tell(1000, 1200, "an epoch")  # the second step
    assert capsys.readouterr().out == ""


# ---- several GPUs in one process


def test_no_replica_is_without_examples(monkeypatch):
    monkeypatch.setattr(devices, "Replicas", lambda model, device_ids: len(device_ids))
    for gpus in range(1, 9):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)  # noqa: B023
        for rows in range(1, 30):
            count = devices.wrap_data_parallel(None, torch.device("cuda"), rows) or 1
            # DataParallel cuts a batch as `chunk` does, into as many pieces or fewer.
            assert len(torch.arange(rows).chunk(count)) == count == len(torch.arange(rows).chunk(gpus))
    assert devices.wrap_data_parallel(None, torch.device("cpu"), 20) is None


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replicas_compute_in_the_precision_that_is_asked_for(monkeypatch, dtype):
    """What torch does with replicas, without GPUs: it calls each in a new thread."""
    seen = []

    def in_threads(self, replicas, inputs, kwargs):
        threads = [
            threading.Thread(target=replica, args=given, kwargs=named)
            for replica, given, named in zip(replicas, inputs, kwargs, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def replica(number, penalty):
        seen.append((number, penalty, torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")))

    monkeypatch.setattr(torch.nn.DataParallel, "parallel_apply", in_threads)
    replicas = devices.Replicas.__new__(devices.Replicas)
    with torch.autocast("cuda", dtype):
        enabled = torch.is_autocast_enabled("cuda")  # only where there is a GPU
        replicas.parallel_apply([replica, replica], [(1,), (2,)], [{"penalty": 3}, {"penalty": 4}])
    assert sorted(seen, key=str) == [(1, 3, dtype, enabled), (2, 4, dtype, enabled)]


# ---- a run whose last.pt is gone


@pytest.mark.parametrize(("events", "refused"), [
    ([], False),
    ([{"event": "train", "epoch": 1, "step": 100}, {"event": "valid", "epoch": 1, "step": 120}], False),
    ([{"event": "train", "epoch": 2, "step": 200}], True),
    ([{"event": "test", "epoch": 1, "step": 120}], True),
    ([{"event": "final", "step": 900}], True),
    ([{"event": "train", "epoch": "two", "step": 200}], False),
])
def test_a_run_that_was_saved_is_not_begun_again_without_its_last(tmp_path, events, refused):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if refused:
        with pytest.raises(UserError, match="has no last.pt to go on from.*without --resume"):
            checkpoints.load_last(tmp_path)
    else:
        assert checkpoints.load_last(tmp_path) is None
    checkpoints.save_checkpoint(tmp_path / "last.pt", {"step": 3})
    assert checkpoints.load_last(tmp_path)["step"] == 3
