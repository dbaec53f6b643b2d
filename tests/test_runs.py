"""Run folders: their creation, locks, args.json, arguments of resumed runs, logs."""

import concurrent.futures
import json
import math
import os
import shlex

from training import flags, runs
from training.console import UserError

import pytest
import torch

# ---- run folders


def create(root, name, script="train_rmc", **record):
    return runs.create_run_folder(root, name, script, {"script": script, **record})


def test_folders_of_runs_started_in_the_same_second_have_different_plain_names(tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        folders = list(pool.map(lambda n: create(tmp_path / "a" / "runs", None, n=n), range(8)))
    assert {runs.read_json(folder / "args.json")["n"] for folder in folders} == set(range(8))
    for folder in folders:
        assert folder.name.startswith("train_rmc-2") and not set(folder.name) & set(": /\\")
    assert set((tmp_path / "a" / "runs").iterdir()) == set(folders)


@pytest.mark.parametrize("name", ["mine-1.0", "läuft"])
def test_plain_names_are_accepted_once(tmp_path, name):
    assert create(tmp_path, name).name == name
    quoted = shlex.quote(str(tmp_path / name))
    with pytest.raises(
        UserError, match="already exists.*or resume that run: python .*train_rmc.py"
    ) as caught:
        create(tmp_path, name)
    assert str(caught.value).endswith(f"--resume {quoted}")
    assert os.listdir(tmp_path) == [name] and os.listdir(tmp_path / name) == ["args.json"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a:b", "a b", "-x", ".hidden", "x" * 101, "a\n"])
def test_other_names_are_rejected(tmp_path, name):
    with pytest.raises(UserError, match="--name must be"):
        create(tmp_path, name)
    assert os.listdir(tmp_path) == []


def test_runs_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run folder in .*file: File exists. Choose another --runs-folder"):
        create(tmp_path / "file", None)


# ---- args.json and resumed arguments


def make_parser():
    parser = flags.Parser("script", "")
    flags.option(parser, "--width", flags.positive_int, 5, "N", "")
    flags.option(parser, "--sizes", flags.positive_int, None, "N", "", nargs="+")
    flags.option(parser, "--bias", flags.finite_float, 0.0, "X", "")
    flags.option(parser, "--style", None, "unit", None, "", choices=("unit", "memory"))
    flags.option(parser, "--epochs", flags.positive_int, 3, "N", "")
    flags.option(parser, "--evaluate", None, None, None, "")
    flags.add_run_flags(parser)
    return parser


def parse(*argv):
    parser = make_parser()
    return flags.parse(parser, "script", parser.given(argv), {}, frozenset({"epochs"}))


@pytest.fixture
def started(tmp_path):
    """A run folder with arguments that are not the defaults."""
    argv = ["--width", "7", "--sizes", "2", "3", "--bias", "-1", "--style", "memory", "--seed", "9"]
    record = runs.record_of("script", parse(*argv), argv, parameters=11)
    return runs.create_run_folder(tmp_path, "run", "script", record)


def resume(folder, *argv):
    return parse("--resume", str(folder), *argv)


def test_args_json_records_arguments_versions_and_hardware(started):
    record = json.loads((started / "args.json").read_text())
    assert record["arguments"]["width"] == 7 and record["parameters"] == 11
    assert record["command_line"][:2] == ["--width", "7"]
    environment = record["environment"]
    assert environment["torch"] == torch.__version__ and environment["threads"] == torch.get_num_threads()
    assert environment["cpu_cores"] == os.cpu_count() and environment["project"] == runs.VERSION
    assert {"python", "numpy", "platform", "cpu", "gpus", "cuda", "commit"} <= environment.keys()


def test_resumed_arguments_are_those_of_the_run(started):
    args = resume(started)
    assert (args.width, args.sizes, args.bias, args.style, args.seed) == (7, [2, 3], -1.0, "memory", 9)
    args = resume(started, "--width", "7", "--epochs", "8", "--threads", "1")
    assert (args.width, args.epochs, args.threads) == (7, 8, 1)
    (started / ".last.pt.abc.tmp").touch()
    runs.note_resume(started, args, ["--epochs", "8"], processes=2)
    again = resume(started)
    assert (again.epochs, again.threads) == (8, 1)
    (note,) = json.loads((started / "args.json").read_text())["resumed"]
    assert note["command_line"] == ["--epochs", "8"] and note["processes"] == 2
    assert os.listdir(started) == ["args.json"]


# ---- log.jsonl


def test_log_has_one_object_per_line_and_no_nan(tmp_path):
    log = runs.RunLog(tmp_path / "log.jsonl")
    log.write("train", step=1, loss=math.nan, text="ü", folder="caf\udce9")
    log.write("final", step=1, loss=math.inf, accuracy_by_n=[0.5, math.nan])
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines())
    assert first == {"event": "train", "step": 1, "loss": None, "text": "ü", "folder": "caf\udce9"}
    assert second == {"event": "final", "step": 1, "loss": None, "accuracy_by_n": [0.5, None]}


def test_lines_that_are_not_events_are_skipped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "train", "step": 1}\n\xff\0\n[1]\n{"event": "tra')  # killed here
    assert list(runs.read_log(path)) == [{"event": "train", "step": 1}]


def test_resumed_log_is_read_as_one_run(tmp_path):
    log = runs.RunLog(tmp_path / "log.jsonl")
    for event, step, loss in [("train", 1, 1.1), ("train", 2, 2.1), ("valid", 2, 7.1), ("train", 3, 3.1)]:
        log.write(event, step=step, loss=loss)
    log.write("resume", step=2)
    log.write("valid", step=2, loss=7.2)  # the save at step 2 was before the validation, which is repeated
    log.write("train", step=3, loss=3.2)
    kept = [event["loss"] for event in runs.read_log(log.path) if event["event"] != "resume"]
    assert kept == [1.1, 2.1, 7.2, 3.2]
