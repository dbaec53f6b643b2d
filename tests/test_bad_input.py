"""Bad command lines and bad files end with status 2, one message, no traceback and no new run folder.

A new flag that takes a number must have one of the tested types.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from training import flags, runs

import pytest
import torch
from conftest import write_corpus

ROOT = Path(__file__).resolve().parent.parent
SMALL_LM = "--batch-size 14 --bptt 15 --epochs 1 --eval-batch-size 3"
SMALL = {
    "train_rmc": f"{SMALL_LM} --emsize 12 --headsize 5 --numheads 2 --keysize 3 --memslots 2",
    "train_rnn": f"{SMALL_LM} --emsize 12 --nhid 14 --nlayers 2",
    "train_nth_farthest": "--num-vectors 3 --num-dims 2 --memslots 2 --headsize 4 --numheads 2 "
    "--outputunits 8 --batch-size 8 --test-examples 10 --steps 5",
}
SMALL = {script: line.split() for script, line in SMALL.items()}
SCRIPTS = [*SMALL, "generate_rmc"]


# ---- running a script as the shell does, in this process


@dataclass
class Answer:
    """What a script printed and how it ended."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        return self.err.partition("error: ")[2].strip()


@pytest.fixture
def answer(capsys, monkeypatch):
    """Return a function that runs a script's file with its own `if __name__ == "__main__"`."""

    def answered(script, *argv):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", [script, *map(str, argv)])
            for owner, name in ((sys, "stdout"), (sys, "stderr"), (warnings, "formatwarning")):
                patch.setattr(owner, name, getattr(owner, name))  # the script replaces them
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        captured = capsys.readouterr()
        return Answer(end.value.code or 0, captured.out, captured.err)

    return answered


def assert_rejected(said, *patterns, case=""):
    """Check for one short message with all the patterns, and nothing that looks like an accident."""
    assert said.status == 2, (case, said)
    assert said.err.count("error: ") == 1 and "Traceback" not in said.out + said.err, (case, said)
    assert 10 < len(said.message) < 900 and said.message.count("\n") <= 2, (case, said.message)
    for pattern in patterns:
        assert re.search(pattern, said.message), (case, pattern, said.message)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Remove what costs time in every run and has its own tests: hardware names, waiting for the disk."""
    monkeypatch.setattr(runs, "describe_environment", dict)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Finished runs of the training scripts, by script; "corpus" is the text of the language models."""
    root = tmp_path_factory.mktemp("runs")
    made = {"corpus": write_corpus(tmp_path_factory.mktemp("corpus"))}
    for script, small in SMALL.items():
        data = [] if script == "train_nth_farthest" else ["--data", str(made["corpus"])]
        importlib.import_module(script).main([*small, *data, "--runs-folder", str(root), "--name", script])
        made[script] = root / script
    return made


# ---- values of flags, by kind

NOT_NUMBERS = ["x", "", " ", "nan", "inf", "-inf", "1e999", "0xf", "1,5", "½"]
# Type of value: smallest accepted, largest accepted, rejected besides NOT_NUMBERS.
KINDS = {
    flags.positive_int: ("1", "2147483647", ["0", "-1", "1.5", "2147483648"]),
    flags.layer_count: ("1", "1000", ["0", "-1", "1.5", "1001"]),
    flags.non_negative_int: ("0", "2147483647", ["-1", "0.5", "2147483648"]),
    flags.thread_count: ("0", "1024", ["-1", "1025"]),
    flags.seed_int: ("0", "4294967295", ["-1", "1.5", "4294967296"]),
    flags.finite_float: ("-1e30", "1e30", ["-1e31", "1e31"]),
    flags.positive_float: ("1e-30", "1e30", ["0", "-0.5", "1e31"]),
    flags.non_negative_float: ("0", "1e30", ["-1e-9", "1e31"]),
    flags.fraction: ("0", "0.999", ["-0.1", "1", "2"]),
    flags.probability: ("1e-9", "1", ["-0.1", "0", "1.001"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_types_of_flags_accept_their_range_and_nothing_else(kind):
    low, high, rejected = KINDS[kind]
    assert [kind(low), kind(high)] == [float(low), float(high)]
    for value in [*NOT_NUMBERS, *rejected]:
        with pytest.raises(argparse.ArgumentTypeError, match="must be .*, got " + re.escape(repr(value))):
            kind(value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_takes_a_number_has_one_of_these_types(script, answer):
    for action in importlib.import_module(script).build_parser()._actions:
        if action.type not in (None, str.lower) and action.dest not in ("num_vectors", "curriculum"):
            assert action.type in KINDS, action.dest
    assert_rejected(answer(script, "--seed=x"), "--seed: must be", "got 'x'", f"See {script}.py --help")


# ---- flags that contradict each other or name what does not exist

REJECTED = [
    ("train_rnn", "--cutoffs 10", ["--cutoffs requires --adaptivesoftmax", "omit --cutoffs"]),
    ("train_rmc", "--adaptivesoftmax --cutoffs 20 10", ["increasing", r"got \[20, 10\]", "Try --cutoffs"]),
    ("train_rmc", "--adaptivesoftmax --data BLANK", ["at least 2 words, got 1"]),
    ("train_rnn", "--tied --adaptivesoftmax", ["--tied and --adaptivesoftmax cannot be comb", "Omit one"]),
    ("train_rnn", "--tied", ["--tied", "--nhid", "12", "14", "--project"]),
    ("train_rnn", "--dropout-candidate 0.2 --cudnn", ["requires an LSTM as a loop", "--no-cudnn"]),
    ("train_rnn", "--dropout-candidate 0.2 --model GRU", ["got GRU", "--dropout-weights"]),
    ("train_rmc", "--dropout-candidate 0.2 --gatestyle none", ["dropout_candidate .*gates"]),
    ("train_nth_farthest", "--num-vectors 1", ["--num-vectors", "from 2 to 1000, got '1'"]),
    ("train_nth_farthest", "--target-accuracy 2", ["--target-accuracy", "above 0 and at most 1"]),
    ("train_nth_farthest", "--curriculum 3x1 2x5", ["a stage 2x5", "3 vectors .* of 2 dimensions", "1 to 2"]),
    ("train_nth_farthest", "--curriculum 3x1@9", ["must be VECTORSxDIMENSIONS, .* got '3x1@9'"]),
    (
        "train_nth_farthest",
        "--curriculum 2x1 --curriculum-batch-size 5 --accumulate 2 --batch-size 4",
        ["--curriculum-batch-size 5"],
    ),
    ("train_rmc", "--cuda", ["--cuda was given but", "Omit --cuda"]),
    ("train_rmc", "--name a/b", ["--name must be", "'a/b'"]),
    ("train_rnn", "--name taken", ["taken already exists", "Choose another --name"]),
    ("train_rnn", "--runs-folder FILE", ["cannot create a run folder in", "Choose another --runs-folder"]),
    ("train_rnn", "--batch-size 2380", ["train.txt and --batch-size", "2,380 tokens", "at most 2,379"]),
    ("train_rmc", "--eval-batch-size 602", ["valid.txt and --eval-batch-size", "at most 601"]),
    ("train_rnn", "--accumulate 3", ["--batch-size 14 is not a multiple of 3", "Try 12 or 15"]),
    ("train_rmc", "--data NONE", ["no folder", "none"]),
    ("train_rmc", "--resume FILE", ["file is not a run folder", "Name the folder of a run"]),
    ("train_rmc", "--resume EMPTY", ["not a run folder: it has no valid args.json"]),
    ("train_rmc", "--resume BEGUN", ["there is no .*last.pt: the run ended before its first save"]),
    ("train_rmc", "--resume OTHER", ["a run of train_rnn.py, not of train_rmc.py"]),
    ("train_rnn", "--resume RUN --emsize 13", ["--emsize cannot change", "12", "13", "Omit --emsize"]),
    ("train_rnn", "--resume RUN --batch_size 64", ["--batch-size cannot change", "14", "64"]),  # the default
    ("train_nth_farthest", "--resume RUN --seed 3", ["--seed cannot change", "1111", "Omit --seed"]),
    ("train_rnn", "--evaluate NONE", ["there is no checkpoint .*none"]),
    ("train_rnn", "--evaluate FILE", ["is not a checkpoint of this project"]),
    ("train_rnn", "--evaluate EMPTY", ["there is no checkpoint .*empty/best.pt"]),
    ("train_rnn", "--evaluate NTH", ["kind 'nth_farthest', expected 'rmc' or 'rnn'"]),
    ("train_nth_farthest", "--evaluate OTHER", ["a run of train_rnn.py"]),
    ("generate_rmc", "--checkpoint NTH", ["kind 'nth_farthest', expected 'rmc' or 'rnn'"]),
    ("generate_rmc", "--checkpoint NTH --outf EMPTY", ["empty is a folder"]),
    ("train_rnn", "--model CNN", ["--model", "'CNN'", "LSTM"]),
    ("train_rmc", "--batch 3", ["unrecognized arguments: --batch"]),  # abbreviations are not guessed
    ("train_rnn", "--lr 1e30", ["diverged", "lower --lr"]),
    ("train_nth_farthest", "--input-scale 1e30", ["diverged", "--input-scale"]),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_cannot_be_followed_are_rejected(script, answer, monkeypatch, tmp_path, trained):
    places = {
        "RUN": trained.get(script),
        "OTHER": trained["train_rnn"],
        "NTH": trained["train_nth_farthest"] / "best.pt",
        "BEGUN": tmp_path / "runs" / "taken",
        **{name: tmp_path / name.lower() for name in ("FILE", "NONE", "EMPTY", "BLANK")},
    }
    places["FILE"].write_text("no checkpoint, no folder")
    places["EMPTY"].mkdir()
    places["BLANK"].mkdir()
    for split in ("train", "valid", "test"):
        (places["BLANK"] / f"{split}.txt").write_text("\n" * 300)
    places["BEGUN"].mkdir(parents=True)
    shutil.copy(trained["train_rmc"] / "args.json", places["BEGUN"])
    monkeypatch.chdir(tmp_path)
    for name, line, patterns in REJECTED:
        if name != script:
            continue
        words = re.sub(r"\b[A-Z]+\b", lambda m: str(places.get(m[0], m[0])), line).split()
        argv = [] if {"--resume", "--evaluate", "--checkpoint"} & set(words) else SMALL[script]
        if argv and script != "train_nth_farthest" and "--data" not in words:
            argv = [*argv, "--data", trained["corpus"]]
        assert_rejected(answer(script, *argv, *words), *patterns, case=line)
        assert os.listdir(tmp_path / "runs") == ["taken"] and os.listdir(places["EMPTY"]) == [], line
        assert sorted(os.listdir(tmp_path)) == ["blank", "empty", "file", "runs"], line


def test_args_json_of_another_version_is_accepted(answer, tmp_path, trained):
    """Unknown flags are ignored, and missing ones have their defaults."""
    copy = tmp_path / "run"
    shutil.copytree(trained["train_rnn"], copy)
    record = json.loads((copy / "args.json").read_text())
    del record["arguments"]["average_decay"]
    record["arguments"]["state_lengths"] = None
    (copy / "args.json").write_text(json.dumps(record))
    assert answer("train_rnn", "--resume", copy, "--epochs", "2").status == 0
    found = json.loads((copy / "args.json").read_text())["arguments"]
    assert found["average_decay"] == 0.999 and found["epochs"] == 2
    # Nothing is left to train: the longer run can still be resumed to its own end.
    assert answer("train_rnn", "--resume", copy, "--epochs", "1").status == 0
    assert json.loads((copy / "args.json").read_text())["arguments"]["epochs"] == 2
