"""Every bad input is answered: a status that is not 0, one message that says what is wrong, no traceback.

The flags' cases are made from the parsers themselves, of every script that has a `build_parser`, so a flag
that is added later is tried as well. What is harmless is accepted. No case leaves a run folder behind.
"""

import importlib
import json
import math
import os
import random
import re
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pytest
import torch
from conftest import write_corpus

import data_utils
import generate_rmc
import nth_farthest
from data_utils import TokenColumns, Vocabulary, load_corpus
from layers.softmax import choose_cutoffs
from relational_rnn_general import RelationalMemory
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM
from training import checkpoints, console, lm_training, runs

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    path.stem for path in ROOT.glob("*.py") if "\ndef build_parser()" in path.read_text(encoding="utf-8")
)


def flags(line):
    return line.split()


SMALL_LM = flags("--batch_size 14 --bptt 15 --epochs 1 --eval-batch-size 3")
SMALL = {
    "train_rmc": flags("--emsize 12 --headsize 5 --numheads 2 --keysize 3 --memslots 2") + SMALL_LM,
    "train_rnn": flags("--emsize 12 --nhid 14 --nlayers 2") + SMALL_LM,
    "train_nth_farthest": flags(
        "--num-vectors 3 --num-dims 2 --memslots 2 --headsize 4 --numheads 2 --outputunits 8 --batch-size 8 "
        "--test-examples 10 --steps 5"
    ),
}


# ---- running a script as the shell does, in this process


@dataclass
class Answer:
    """What a script said and how it ended."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        return self.err.partition("error: ")[2].strip()


def answer(capsys, monkeypatch, script, argv):
    """Runs the file `script` with its own `if __name__ == "__main__"`."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    path = ROOT / f"{script}.py"
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    captured = capsys.readouterr()
    return Answer(0 if end.value.code is None else end.value.code, captured.out, captured.err)


def assert_refused(said, *patterns):
    """One short message with all the patterns, and nothing else that looks like an accident."""
    assert said.status == 2, said
    assert said.err.count("error: ") == 1 and "Traceback" not in said.out + said.err, said
    assert 10 < len(said.message) < 900 and said.message.count("\n") <= 2, said.message
    for pattern in patterns:
        assert re.search(pattern, said.message), (pattern, said.message)


def assert_nothing_left(*folders):
    for folder in folders:
        assert not folder.exists() or os.listdir(folder) == [], folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What costs time in every run and has its own tests: hardware names, waiting for the disk."""
    monkeypatch.setattr(runs, "describe_environment", dict)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    load_corpus(str(folder))  # cached
    return folder


@pytest.fixture
def stop_after_one_step(monkeypatch):
    """Every loop finds at its first look that SIGTERM has come."""
    enter = console.Interrupts.__enter__

    def stopped(self):
        enter(self)
        self.requested = "SIGTERM"
        return self

    monkeypatch.setattr(console.Interrupts, "__enter__", stopped)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """Finished runs of all three training scripts, by script."""
    root = tmp_path_factory.mktemp("runs")
    made = {}
    for script, small in SMALL.items():
        data = [] if script == "train_nth_farthest" else ["--data", str(corpus)]
        importlib.import_module(script).main([*small, *data, "--runs-folder", str(root), "--name", script])
        made[script] = root / script
    return made


# ---- flags, from the parsers


def is_number(action):
    """Whether a flag takes a number: its type reads some and refuses a word."""

    def reads(text):
        try:
            return action.type(text) is not None
        except Exception:
            return False

    return (
        action.type is not None and action.option_strings and (reads("1") or reads("0.5")) and not reads("x")
    )


def number_flags():
    for script in SCRIPTS:
        for action in importlib.import_module(script).build_parser()._actions:
            if is_number(action):
                yield script, action


FLAGS = [(script, action.option_strings[0]) for script, action in number_flags()]
VALUE_OPTIONAL = {
    (script, action.option_strings[0]) for script, action in number_flags() if action.nargs == "?"
}
NO_NUMBERS = ["x", "", " ", "nan", "inf", "-inf", "1e999", "1e31", "0x10", "1,5", "½"]


def test_the_table_knows_the_scripts():
    assert {*SMALL, "benchmark", "generate_rmc", "plot_runs"} <= set(SCRIPTS)
    assert len(FLAGS) > 60


@pytest.mark.parametrize("value", [*NO_NUMBERS, None], ids=repr)
@pytest.mark.parametrize("script, flag", FLAGS)
def test_what_is_no_number_is_refused_by_every_flag_that_wants_one(script, flag, value, capsys, monkeypatch):
    """Wrong type, NaN, infinite, beyond all use, and no value at all."""
    if value is None and (script, flag) in VALUE_OPTIONAL:
        return
    module = importlib.import_module(script)
    argv = [flag] if value is None else [f"{flag}={value}"]
    with pytest.raises(SystemExit) as end:
        module.build_parser().parse_args(argv)
    captured = capsys.readouterr()
    said = Answer(end.value.code, captured.out, captured.err)
    assert_refused(said, f"argument .*{re.escape(flag)}", "expected" if value is None else "must be .*got")
    if value:
        assert value in said.message


def edge_cases():
    """Zero, negative and huge, for the scripts that can be run in a moment."""
    for script, action in number_flags():
        if script in SMALL or script == "generate_rmc":
            whole = not _reads(action, "0.5")
            for value in ("0", "-1", "1.5" if whole else "1e-30", "2147483647" if whole else "1e30"):
                yield script, action.option_strings[0], value


def _reads(action, text):
    try:
        action.type(text)
    except Exception:
        return False
    return True






@pytest.mark.parametrize("script, flag, value", list(edge_cases()))
def test_zero_negative_and_huge_are_refused_or_done(
    script, flag, value, capsys, monkeypatch, tmp_path, corpus, trained, stop_after_one_step
):
    """Either the run takes its step and saves it, or one message says why not, and no folder is left."""
    folder = tmp_path / "runs"
    argv = [*SMALL.get(script, []), "--runs-folder", folder]
    if script == "generate_rmc":
        argv += ["--checkpoint", trained["train_rnn"], "--words", "3", "--outf", tmp_path / "text"]
    elif script != "train_nth_farthest":
        argv += ["--data", corpus]
    said = answer(capsys, monkeypatch, script, [*argv, f"{flag}={value}"])
    if said.status in (0, 143):
        assert "error" not in said.err
        for last in folder.glob("*/last.pt"):
            checkpoints.load_checkpoint(last)
        assert script == "generate_rmc" or len(list(folder.glob("*/last.pt"))) == 1
    else:
        assert_refused(said)
        assert_nothing_left(folder)


# ---- flags, by hand

CONTRADICTIONS = [
    ("train_rnn", "--cutoffs 10", ["--cutoffs .*without --adaptivesoftmax", "leave --cutoffs away"]),
    ("train_rmc", "--cutoffs 10", ["--cutoffs .*without --adaptivesoftmax", "leave --cutoffs away"]),
    ("train_rnn", "--adaptivesoftmax --cutoffs 20 10", ["increasing", r"got \[20, 10\]", "Try --cutoffs"]),
    ("train_rmc", "--adaptivesoftmax --cutoffs 10 10", ["increasing", r"got \[10, 10\]", "Try --cutoffs"]),
    ("train_rmc", "--adaptivesoftmax --cutoffs 5 22", ["vocabulary size 22", r"got \[5, 22\]"]),
    ("train_rnn", "--adaptivesoftmax --cutoffs 2147483647", ["vocabulary size 22", "Try --cutoffs"]),
    ("train_rnn", "--tied --adaptivesoftmax", ["--tied and --adaptivesoftmax exclude", "Leave one"]),
    ("train_rnn", "--tied", ["--tied", "--nhid", "12", "14", "--project"]),
    ("train_rmc", "--evaluate RUN --resume RUN", ["--evaluate and --resume exclude"]),
    ("train_nth_farthest", "--evaluate RUN --resume RUN", ["--evaluate and --resume exclude"]),
    ("train_nth_farthest", "--total-units 16", ["--total-units and --headsize exclude"]),
    ("train_nth_farthest", "--num-vectors 1", ["--num-vectors", "1"]),
    ("train_rmc", "--cuda", ["--cuda was given but", "Leave --cuda away"]),
    ("train_nth_farthest", "--cuda", ["--cuda was given but", "Leave --cuda away"]),
    ("generate_rmc", "--cuda --checkpoint RUN", ["--cuda was given but", "Leave --cuda away"]),
    ("benchmark", "--cuda", ["--cuda was given but", "Leave --cuda away"]),
    ("train_rmc", "--name a/b", ["--name must be", "'a/b'"]),
    ("train_rmc", "--name ..", ["--name must be", r"'\.\.'"]),
    ("train_nth_farthest", "--name a:b", ["--name must be", "'a:b'"]),
    ("train_rnn", "--name taken", ["taken is there already", "Choose another --name", "no args.json"]),
    ("train_rnn", "--runs-folder FILE", ["cannot make a run folder in", "Give another --runs-folder"]),
    ("train_rnn", "--runs-folder FILE/below", ["cannot make a run folder in", "Give another --runs-folder"]),
    ("train_nth_farthest", "--runs-folder FILE", ["cannot make a run folder", "Give another --runs-folder"]),
    ("train_rnn", "--batch_size 2380", ["train.txt and --batch_size", "2,380 tokens", "at most 2,379"]),
    ("train_rmc", "--eval-batch-size 602", ["valid.txt and --eval-batch-size", "at most 601"]),
    ("train_rmc", "--headsize 2147483647", ["sizes", "Lower"]),
    ("train_rnn", "--nhid 2000000", ["needs .* GB", "has .* GB", "Lower"]),
    ("train_rmc", "--resume FILE", ["--resume needs the folder", "a file"]),
    ("train_rmc", "--resume NONE", ["--resume needs the folder", "not there"]),
    ("train_rmc", "--resume EMPTY", ["no args.json", "made by an earlier run"]),
    ("train_rmc", "--resume OTHER", ["a run of train_rnn.py, this is train_rmc.py"]),
    ("train_rnn", "--resume RUN --emsize 13", ["--emsize cannot change", "12", "13", "Leave --emsize away"]),
    ("train_nth_farthest", "--resume RUN --seed 3", ["--seed cannot change", "1111", "Leave --seed away"]),
    ("train_rnn", "--evaluate NONE", ["no checkpoint", "not there"]),
    ("train_rnn", "--evaluate FILE", ["is not a checkpoint of this project"]),
    ("train_rnn", "--evaluate EMPTY", ["no best.pt in", "Give a run folder"]),
    ("train_rnn", "--evaluate NTH", ["'nth_farthest', not a language model", "Use a best.pt"]),
    ("train_nth_farthest", "--evaluate NONE", ["folder of an earlier run", "not there"]),
    ("train_nth_farthest", "--evaluate EMPTY", ["no args.json"]),
    ("train_nth_farthest", "--evaluate OTHER", ["a run of train_rnn.py"]),
    ("generate_rmc", "--checkpoint NONE", ["no checkpoint", "not there"]),
    ("generate_rmc", "--checkpoint FILE", ["is not a checkpoint of this project"]),
    ("generate_rmc", "--checkpoint EMPTY", ["no best.pt in"]),
    ("generate_rmc", "--checkpoint NTH", ["not a language model", "Use a best.pt"]),
    ("generate_rmc", "--runs-folder EMPTY", ["no trained model", "Train one first"]),
    ("generate_rmc", "--runs-folder NONE", ["no trained model", "Train one first"]),
    ("generate_rmc", "--checkpoint RUN --prompt xyzzy", ["not in the vocabulary", "xyzzy", "spelling"]),
    ("generate_rmc", "--checkpoint RUN --outf EMPTY", ["--outf must be a file in a folder"]),
    ("generate_rmc", "--checkpoint RUN --outf NONE/text", ["--outf must be a file in a folder"]),
    ("plot_runs", "NONE", ["no run folder", "not there"]),
    ("plot_runs", "FILE", ["no run folder", "a file"]),
    ("plot_runs", "EMPTY", ["there is no run to draw", "a folder with runs"]),
    ("plot_runs", "OTHER NTH", ["no axis in common", "Plot language models and Nth farthest separately"]),
    ("plot_runs", "OTHER --outf EMPTY", ["cannot write"]),
    ("plot_runs", "OTHER --outf NONE/x.png", ["cannot write"]),
    ("benchmark", "--csv EMPTY", ["is a folder", "Give the path of a file"]),
    ("benchmark", "--markdown NONE/x.md", ["no folder", "Give the path of a file"]),
    ("benchmark", "--only nothing", ["invalid choice: 'nothing'"]),
    *(
        ("benchmark", f"--shapes {bad}", ["two whole numbers like 64x100", f"'{bad}'"])
        for bad in ("64", "x", "0x3", "3x0", "axb", "3x", "1.5x2", "3x3x3", "nanx3")
    ),
    ("train_rnn", "--model CNN", ["--model", "'CNN'", "LSTM"]),
    ("train_rmc", "--gatestyle units", ["--gatestyle", "'units'", "memory"]),
    ("train_rmc", "--recipe huge", ["--recipe", "'huge'", "tiny"]),
    ("train_rmc", "--vocab-from valid", ["--vocab-from", "'valid'", "train"]),
    ("train_rmc", "--schedule linear", ["--schedule", "'linear'", "cosine"]),
    ("train_nth_farthest", "--model gru", ["--model", "'gru'", "lstm"]),
    ("train_rmc", "--batch 3", ["unrecognized arguments: --batch"]),  # no guessing what was meant
    ("train_rmc", "stray", ["unrecognized arguments: stray"]),
    ("train_rmc", "--cuda=yes", ["--cuda", "'yes'"]),
    ("plot_runs", "", ["RUN_FOLDER"]),
    ("train_rnn", "--lr 1e30", ["diverged", "no checkpoint", "lower --lr .*1e.30"]),
    ("train_nth_farthest", "--input-scale 1e30", ["no longer finite", "No checkpoint", "--input-scale"]),
]


@pytest.mark.parametrize("script, line, patterns", CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_flags_that_cannot_be(script, line, patterns, capsys, monkeypatch, tmp_path, corpus, trained):
    places = {
        "RUN": trained.get(script, trained["train_rnn"]),
        "OTHER": trained["train_rnn"],
        "NTH": trained["train_nth_farthest"]
        if script == "plot_runs"
        else trained["train_nth_farthest"] / "best.pt",
        "FILE": tmp_path / "file",
        "NONE": tmp_path / "none",
        "EMPTY": tmp_path / "empty",
    }
    places["FILE"].write_text("no checkpoint, no folder")
    places["EMPTY"].mkdir()
    words = [re.sub(r"^[A-Z]+(?=/|$)", lambda m: str(places.get(m[0], m[0])), word) for word in line.split()]
    resumed = "--resume" in words or "--evaluate" in words
    argv = [] if resumed else SMALL.get(script, [])
    if script in ("train_rmc", "train_rnn") and not resumed:
        argv = [*argv, "--data", corpus]
    if script in SMALL and "--runs-folder" not in words:
        argv = [*argv, "--runs-folder", tmp_path / "runs"]
    if "taken" in words:
        (tmp_path / "runs" / "taken").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    said = answer(capsys, monkeypatch, script, [*argv, *words])
    assert_refused(said, *patterns)
    if "taken" in words:
        (tmp_path / "runs" / "taken").rmdir()
    assert_nothing_left(tmp_path / "runs", places["EMPTY"])
    assert sorted(path.name for path in tmp_path.iterdir()) in (["empty", "file"], ["empty", "file", "runs"])


def test_args_that_were_edited_by_hand(capsys, monkeypatch, tmp_path, trained):
    for script, run in trained.items():
        copy = tmp_path / script
        shutil.copytree(run, copy)
        record = json.loads((copy / "args.json").read_text())
        for name, bad in [("seed", -1), ("lr", math.nan), ("lr", "x"), ("log_interval", 0), ("clip", None)]:
            edited = {**record, "arguments": {**record["arguments"], name: bad}}
            (copy / "args.json").write_text(json.dumps(edited))
            said = answer(capsys, monkeypatch, script, ["--resume", copy])
            assert_refused(said, "args.json holds", "no valid value", "Was it edited?")
        (copy / "args.json").write_bytes(b"\xff\xfe{")
        assert_refused(answer(capsys, monkeypatch, script, ["--resume", copy]), "args.json cannot be read")


def test_plots_of_logs_that_are_none(capsys, monkeypatch, tmp_path, trained):
    copy = tmp_path / "run"
    shutil.copytree(trained["train_rnn"], copy)
    argv = [copy, "--outf", tmp_path / "x.png"]
    for content in (b"", b"\0\xff\n" * 50, b"[]\n7\n{}\n", b'{"event": "train", "step": 1}\n'):
        (copy / "log.jsonl").write_bytes(content)
        assert_refused(answer(capsys, monkeypatch, "plot_runs", argv), "nothing to plot yet", "run")
    (copy / "log.jsonl").unlink()
    assert_refused(answer(capsys, monkeypatch, "plot_runs", argv), "no log.jsonl")
    for content in ("", "[]", '{"script": "train_rmc"}', '{"script": "x", "arguments": {}}', "\0"):
        (copy / "log.jsonl").write_bytes(b"")
        (copy / "args.json").write_text(content)
        assert_refused(answer(capsys, monkeypatch, "plot_runs", argv), "cannot be read|no plot")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "line, patterns",
    [
        ("--folder FILE", ["cannot write into", "Give another --folder"]),
        ("--folder FILE/below", ["cannot write into", "Give another --folder"]),
        ("--folder NONE --check", ["missing or changed in"]),
        ("--folder", ["expected one argument"]),
        ("--chek", ["unrecognized arguments"]),
    ],
)
def test_make_tiny(line, patterns, capsys, monkeypatch, tmp_path):
    (tmp_path / "FILE").write_text("")
    monkeypatch.chdir(tmp_path)
    sys.path.insert(0, str(ROOT / "data"))
    try:
        make_tiny = importlib.import_module("make_tiny")
    finally:
        sys.path.pop(0)
    known = {name: (ROOT / "data" / "tiny" / name).read_bytes() for name in ("train.txt", "entropy.json")}
    monkeypatch.setattr(make_tiny, "files", lambda: known)  # to make them takes seconds
    try:
        status = make_tiny.main(line.split())
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    assert status in (1, 2) and captured.err.count("error: ") == 1 and "Traceback" not in captured.err
    for pattern in patterns:
        assert re.search(pattern, captured.err)
    assert os.listdir(tmp_path) == ["FILE"]


# ---- texts


def rewrite(split, content):
    def spoil(folder):
        path = folder / f"{split}.txt"
        text = path.read_bytes()
        path.write_bytes(content(text) if callable(content) else content)

    return spoil


def instead(split, make):
    def spoil(folder):
        (folder / f"{split}.txt").unlink()
        make(folder / f"{split}.txt")

    return spoil


def nothing(path):
    pass


def binary(text):
    return random.Random(8).randbytes(5000)


def utf16(text):
    return text.decode().encode("utf-16")


REFUSED_TEXTS = {
    "no train": (instead("train", nothing), ["no train.txt in", "found: .*valid.txt", "Expected"]),
    "no valid": (instead("valid", nothing), ["no valid.txt in", "found: .*train.txt", "Expected"]),
    "no test": (instead("test", nothing), ["no test.txt in", "found: .*train.txt", "Expected"]),
    "folder for a file": (instead("valid", Path.mkdir), ["valid.txt is not a file", "Expected"]),
    "pipe for a file": (instead("train", os.mkfifo), ["train.txt is not a file", "Expected"]),
    "link to nothing": (instead("test", lambda p: p.symlink_to("gone")), ["test.txt is not a file"]),
    "link to itself": (instead("test", lambda p: p.symlink_to(p.name)), ["test.txt is not a file"]),
    "empty train": (rewrite("train", b""), ["train.txt is empty", "Expected one sentence per line"]),
    "empty valid": (rewrite("valid", b""), ["valid.txt is empty", "Expected one sentence per line"]),
    "a mark and nothing": (rewrite("test", b"\xef\xbb\xbf"), ["test.txt is empty"]),
    "one word": (rewrite("train", b"word"), ["train.txt and --batch_size", "2 tokens", "at most 1"]),
    "one line": (rewrite("train", b"one short line\n"), ["4 tokens", "needs 15", "at most 3"]),
    "one line feed": (rewrite("train", b"\n"), ["1 tokens", "Use a longer text"]),
    "short valid": (rewrite("valid", b"a b\n"), ["valid.txt and --eval-batch-size", "at most 2"]),
    "short test": (rewrite("test", b"a\n"), ["test.txt and --eval-batch-size", "at most 1"]),
    "binary": (rewrite("train", binary), ["train.txt is not UTF-8 text: byte", "iconv"]),
    "an image": (rewrite("valid", b"\x89PNG\r\n\x1a\n" + bytes(99)), ["not UTF-8 text: byte 0 is 0x89"]),
    "gzip": (rewrite("train", b"\x1f\x8b\x08\0\0\0\0\0"), ["not UTF-8 text: byte 1 is 0x8b"]),
    "UTF-16": (rewrite("train", utf16), ["starts like UTF-16", "iconv -f UTF-16 "]),
    "UTF-16, the other order": (
        rewrite("train", lambda text: b"\xfe\xff" + text.decode().encode("utf-16-be")),
        ["starts like UTF-16", "iconv -f UTF-16 "],
    ),
    "UTF-16 without a mark": (
        rewrite("train", lambda text: text.decode().encode("utf-16-le")),
        ["byte 1 is 0x00", "may be UTF-16"],
    ),
    "UTF-32": (rewrite("train", lambda text: text.decode().encode("utf-32")), ["not UTF-8 text", "iconv"]),
    "Latin-1": (
        rewrite("test", lambda text: text.decode().encode("latin-1")),
        ["test.txt is not UTF-8 text", "0xdc", "may be Latin-1", "iconv -f LATIN1"],
    ),
    "Windows-1252": (rewrite("test", b"\x93quoted\x94 words\n" * 9), ["byte 0 is 0x93", "iconv"]),
    "NUL": (rewrite("train", lambda text: text[:500] + b"\0" + text[500:]), ["byte 500 is 0x00"]),
    "all NUL": (rewrite("valid", bytes(4000)), ["byte 0 is 0x00"]),
    "NUL at the end": (rewrite("valid", lambda text: text + b"\0"), ["byte [0-9,]+ is 0x00"]),
    "half a character": (rewrite("train", lambda text: text + b"\xe2\x82"), ["is 0xe2"]),
    "half a surrogate": (rewrite("train", lambda text: text + b"\xed\xa0\x80 x\n"), ["is 0xed"]),
    "overlong": (rewrite("train", lambda text: text + b"\xc0\xaf\n"), ["is 0xc0"]),
}


@pytest.mark.parametrize("fault", REFUSED_TEXTS)
def test_texts_that_are_refused(fault, capsys, monkeypatch, tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    spoil, patterns = REFUSED_TEXTS[fault]
    spoil(folder)
    script = random.Random(fault).choice(["train_rmc", "train_rnn"])
    argv = [*SMALL[script], "--data", folder, "--runs-folder", tmp_path / "runs"]
    assert_refused(answer(capsys, monkeypatch, script, argv), *patterns)
    assert_nothing_left(tmp_path / "runs")
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    "data, patterns",
    [
        ("no/such/folder", ["no folder 'no/such/folder'", "'tiny'"]),
        ("", ["no folder ''", "'tiny'"]),
        ("x" * 5000, ["no folder"]),
        ("corpus/train.txt", ["is a file", "Expected a folder"]),
        ("/dev/null", ["is a file", "Expected a folder"]),
        ("EMPTY", ["no train.txt", "found: nothing"]),
    ],
)
def test_folders_that_are_refused(data, patterns, capsys, monkeypatch, tmp_path):
    write_corpus(tmp_path / "corpus")
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    said = answer(capsys, monkeypatch, "train_rmc", [*SMALL["train_rmc"], "--data", data])
    assert_refused(said, *patterns)
    assert sorted(os.listdir(tmp_path)) == ["EMPTY", "corpus"]


HARMLESS_TEXTS = {
    "carriage returns": lambda text: text.replace(b"\n", b"\r\n"),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "both": lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"),
    "no line feed at the end": lambda text: text.removesuffix(b"\n"),
    "more spaces": lambda text: text.replace(b" ", b"  ").replace(b"\n", b" \n"),
    "tabs": lambda text: text.replace(b" ", b"\t"),
    "no-break spaces": lambda text: text.replace(b" ", "\u00a0".encode()),
}


@pytest.mark.parametrize("change", HARMLESS_TEXTS)
def test_harmless_texts_give_the_same_ids(change, tmp_path):
    expected = load_corpus(str(write_corpus(tmp_path / "plain")))
    folder = write_corpus(tmp_path / "changed")
    for split in data_utils.SPLITS:
        path = folder / f"{split}.txt"
        path.write_bytes(HARMLESS_TEXTS[change](path.read_bytes()))
    found = load_corpus(str(folder))
    assert found.vocabulary.words == expected.vocabulary.words
    for split in data_utils.SPLITS:
        assert torch.equal(getattr(found, split), getattr(expected, split))


def test_blank_lines_at_the_end_are_accepted(capsys, monkeypatch, tmp_path, stop_after_one_step):
    """Each is an empty sentence: the ids of all that comes before stay the same words."""
    folder = write_corpus(tmp_path / "corpus")
    plain = load_corpus(str(folder))
    (folder / "train.txt").write_bytes((folder / "train.txt").read_bytes() + b"\n\r\n  \n")
    more = load_corpus(str(folder))
    words = more.vocabulary.decode(more.train.tolist())
    assert words == plain.vocabulary.decode(plain.train.tolist()) + [data_utils.EOS] * 3
    argv = [*SMALL["train_rnn"], "--data", folder, "--runs-folder", tmp_path / "runs"]
    assert answer(capsys, monkeypatch, "train_rnn", argv).status == 143


def test_a_line_of_100_megabytes_is_trained_on(capsys, monkeypatch, tmp_path, stop_after_one_step):
    folder = write_corpus(tmp_path / "corpus")
    line = b" ".join([b"x" * 999, b"y" * 999] * 50_000)
    (folder / "train.txt").write_bytes(line)
    assert len(line) > 99_900_000 and b"\n" not in line
    argv = [*SMALL["train_rnn"], "--data", folder, "--runs-folder", tmp_path / "runs"]
    said = answer(capsys, monkeypatch, "train_rnn", argv)
    assert said.status == 143 and "100,001" in said.out


def test_a_corpus_that_cannot_be_fetched(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(data_utils, "DATA_FOLDER", tmp_path / "data")
    for name, published in data_utils.PUBLISHED.items():
        nowhere = data_utils.Published(("http://127.0.0.1:9/",), published.digests, published.max_bytes)
        monkeypatch.setitem(data_utils.PUBLISHED, name, nowhere)
        said = answer(capsys, monkeypatch, "train_rmc", ["--data", name, "--runs-folder", tmp_path / "runs"])
        assert_refused(said, f"cannot fetch {name} ", "by hand", "--data tiny")
    assert_nothing_left(tmp_path / "data", tmp_path / "runs")


# ---- memory


@pytest.mark.parametrize(
    "script, what, lower",
    [
        ("train_rmc", "model.forward", "--batch_size or --bptt, .*--adaptivesoftmax"),
        ("train_rnn", "model.forward", "--batch_size or --bptt, .*--adaptivesoftmax"),
        ("train_nth_farthest", "--batch-size=2147483647", "--batch-size .*--test-examples"),
        ("train_nth_farthest", "--test-examples=2147483647", "--batch-size .*--test-examples"),
        ("generate_rmc", "--samples=2147483647", "--samples"),
        ("train_rmc", "loading", "--batch_size or --bptt, .*--adaptivesoftmax"),
    ],
)
def test_memory_that_runs_out_is_answered_with_what_to_lower(
    script, what, lower, capsys, monkeypatch, tmp_path, corpus, trained
):
    argv = [*SMALL.get(script, []), "--runs-folder", tmp_path / "runs"]
    if script != "train_nth_farthest":
        argv += ["--checkpoint", trained["train_rnn"]] if script == "generate_rmc" else ["--data", corpus]

    def too_much(*args, **kwargs):
        return torch.empty(2**60)

    if what == "model.forward":
        model = RelationalMemoryLM if script == "train_rmc" else RNNLM
        monkeypatch.setattr(model, "forward", too_much)
    elif what == "loading":
        monkeypatch.setattr(lm_training, "load_corpus", lambda *args: bytearray(2**62))
    else:
        argv += [what]
    said = answer(capsys, monkeypatch, script, argv)
    assert_refused(said, "^out of memory", f"Lower {lower}.*$")
    assert_nothing_left(tmp_path / "runs")


# ---- prompts


@pytest.mark.parametrize(
    "prompt, status", [("the xyzzy ant", 0), ("xyzzy", 2), ("x\0y", 2), ("", 0), ("\udcff", 2), ("\u3000", 0)]
)
def test_prompts(prompt, status, capsys, monkeypatch, tmp_path, trained):
    """Some unknown words are read as <unk>, with a warning; nothing but unknown words is refused."""
    argv = ["--checkpoint", trained["train_rnn"], "--words", "3", "--outf", tmp_path / "text"]
    said = answer(capsys, monkeypatch, "generate_rmc", [*argv, "--prompt", prompt])
    assert said.status == status and ("warning: not in the model's" in said.err) == ("ant" in prompt)
    assert (tmp_path / "text").exists() == (status == 0)
    if status:
        assert_refused(said, "not in the vocabulary", "check spelling")


# ---- public functions

CORE = {"mem_slots": 2, "head_size": 3, "input_size": 5, "num_heads": 2}
RMC = {"vocab_size": 50, "embedding_size": 4, "mem_slots": 2, "head_size": 3, "num_heads": 2}
RNN = {"vocab_size": 50, "model": "LSTM", "embedding_size": 4, "hidden_size": 4}
NTH = {
    "num_vectors": 3, "num_dims": 2, "model": "rmc", "mem_slots": 2, "head_size": 3, "num_heads": 2,
    "num_blocks": 1, "forget_bias": 1.0, "input_bias": 0.0, "gate_style": "unit", "attention_mlp_layers": 2,
    "key_size": None, "hidden_size": 4, "head_layers": 1, "head_units": 4,
}  # fmt: skip
NO_SIZES = (0, -1, 1.5, "4", math.nan)


def bad_arguments():
    """(name, class, its good arguments, the bad one, its value)"""
    for name in (*CORE, "num_blocks", "attention_mlp_layers", "input_rows"):
        for value in (*NO_SIZES, None, True):
            yield RelationalMemory, CORE, name, value
    for value in (-1, 1.5, "4", math.nan):
        yield RelationalMemory, CORE, "key_size", value
    for name in ("forget_bias", "input_bias"):
        for value in (math.nan, math.inf, "x", None):
            yield RelationalMemory, CORE, name, value
    yield RelationalMemory, CORE, "gate_style", "units"
    for kind, good in ((RelationalMemoryLM, RMC), (RNNLM, RNN)):
        for name in ("vocab_size", "embedding_size"):
            for value in NO_SIZES:
                yield kind, good, name, value
        for name in ("dropout_input", "dropout_output"):
            for value in (1.0, -0.1, math.nan, math.inf):
                yield kind, good, name, value
        for cutoffs in ([5, 3], [3, 3], [0, 5], [-1], [50], [51], [], [1.5], "ab"):
            yield kind, good, "cutoffs", cutoffs
    for name, values in (("hidden_size", NO_SIZES), ("num_layers", NO_SIZES), ("model", ("CNN", None))):
        for value in values:
            yield RNNLM, RNN, name, value
    for name in ("num_vectors", "num_dims", "head_layers", "head_units", "hidden_size"):
        for value in NO_SIZES:
            yield nth_farthest.NthFarthestModel, NTH, name, value
    for name in ("input_scale", "memory_scale"):
        for value in (0, -1, math.nan, math.inf):
            yield nth_farthest.NthFarthestModel, NTH, name, value
    yield nth_farthest.NthFarthestModel, NTH, "model", "gru"


def test_arguments_of_the_models_are_refused_by_name_and_value():
    tried = list(bad_arguments())
    assert len(tried) > 150
    for kind, good, name, value in tried:
        kind(**good)
        with pytest.raises(ValueError) as caught:
            kind(**{**good, name: value})
        message = str(caught.value)
        assert name in message and "must" in message and "got" in message, (kind, name, value, message)


def draw(**options):
    return generate_rmc.choose(torch.zeros(2, 5), **options)


def core_of(inputs, memory_of=3, **shape):
    core = RelationalMemory(**CORE)
    return core(torch.zeros(*inputs), core.initial_state(memory_of))


CALLS = [
    (lambda: Vocabulary(["a", "a"]), "1 different of 2"),
    (lambda: Vocabulary(["a", 3]), "strings"),
    (lambda: Vocabulary(["a"]).decode([1]), "from 0 to 0, got 1"),
    (lambda: Vocabulary(["a"]).decode([-1]), "from 0 to 0, got -1"),
    (lambda: load_corpus("tiny", "valid"), "vocab_from must be 'all' or 'train', got 'valid'"),
    (lambda: TokenColumns(torch.arange(9), 0), "batch_size must be at least 1, got 0"),
    (lambda: list(TokenColumns(torch.arange(9), 2).windows(0)), "bptt must be at least 1"),
    (lambda: choose_cutoffs(0), "at least 2 words, got 0"),
    (lambda: choose_cutoffs(-1), "at least 2 words, got -1"),
    (lambda: draw(temperature=-1), "temperature .* got -1"),
    (lambda: draw(temperature=math.nan), "temperature .* got nan"),
    (lambda: draw(temperature=math.inf), "temperature .* got inf"),
    (lambda: draw(top_k=-1), "top_k must be 0 or more"),
    (lambda: draw(top_p=0), "top_p above 0"),
    (lambda: draw(top_p=1.5), "top_p above 0 and at most 1"),
    (lambda: draw(top_p=math.nan), "top_p above 0"),
    (lambda: draw(banned=range(5)), "all 5 words are banned"),
    (lambda: nth_farthest.make_batch(0, 3, 2, torch.Generator()), "at least 1, got 0, 3 and 2"),
    (lambda: nth_farthest.make_batch(4, 0, 2, torch.Generator()), "at least 1, got 4, 0 and 2"),
    (lambda: nth_farthest.make_batch(4, 3, -1, torch.Generator()), "at least 1, got 4, 3 and -1"),
    (lambda: core_of((3, 5)), r"\(B, T, ...\) with 5 features .*got \(3, 5\)"),
    (lambda: core_of((3, 4, 6)), r"with 5 features .*got \(3, 4, 6\)"),
    (lambda: core_of((3, 0, 5)), "at least one time step, got T = 0"),
    (lambda: core_of((3, 4, 5), memory_of=2), r"memory must have shape .*\(3, 2, 6\), got \(2, 2, 6\)"),
    (lambda: core_of((3, 4, 5), memory_of=1), r"memory must have shape .*\(3, 2, 6\), got \(1, 2, 6\)"),
]


@pytest.mark.parametrize("call, message", CALLS, ids=[message[:40] for _, message in CALLS])
def test_public_functions_say_what_was_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- variables of the original module


def sonnet_variables(core):
    return {
        name: (value.detach().t() if value.dim() == 2 else value.detach()).numpy().copy()
        for name, value in core._sonnet_names().items()
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: 1.5, "must hold finite|must be an array|must have shape"),
        (lambda v: "text", "must be an array of numbers"),
        (lambda v: None, "must be an array of numbers"),
        (lambda v: [[1.0], [1.0, 2.0]], "must be an array of numbers"),
        (lambda v: np.full(v.shape, "a"), "must be an array of numbers"),
        (lambda v: np.full(v.shape, object()), "must be an array of numbers"),
        (lambda v: v[:-1], "must have shape"),
        (lambda v: v.T, "must have shape"),
        (lambda v: v.astype(int), "floating point"),
        (lambda v: v.astype(complex), "floating point"),
        (lambda v: np.full_like(v, math.nan), "finite numbers"),
        (lambda v: np.full_like(v, math.inf), "finite numbers"),
        (lambda v: np.full(v.shape, 1e300), "within the range of torch.float32"),
    ],
)
def test_sonnet_variables_that_do_not_fit(change, message):
    core = RelationalMemory(**CORE)
    before = {name: value.clone() for name, value in core.state_dict().items()}
    variables = sonnet_variables(core)
    name = "linear/w"
    with pytest.raises(ValueError, match=f"{name}.*({message})"):
        core.load_sonnet_variables({**variables, name: change(variables[name])})
    for name, value in core.state_dict().items():
        assert torch.equal(value, before[name])
    for wrong in (None, [1, 2], "x"):
        with pytest.raises(ValueError, match="must map names to arrays"):
            core.load_sonnet_variables(wrong)


class Trap:
    """Pickles to something that leaves a mark when it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_golden_files_are_read_without_running_what_is_in_them(tmp_path):
    """As tests and documentation read them: NumPy's own loader, told to refuse pickles."""
    mark, path = tmp_path / "mark", tmp_path / "evil.npz"
    np.savez(path, **{"var/linear/w": np.array([Trap(mark)], dtype=object)})
    core = RelationalMemory(**CORE)
    with np.load(path, allow_pickle=False) as file, pytest.raises(ValueError, match="allow_pickle"):
        core.load_sonnet_variables({name: file[name] for name in file.files})
    assert not mark.exists()
    golden = next((ROOT / "tests" / "golden").glob("*.npz")).read_bytes()
    whole = path.write_bytes(golden)
    for length in (0, 10, whole // 2, whole - 1):
        path.write_bytes(golden[:length])
        with pytest.raises((ValueError, OSError, EOFError, BadZipFile)), np.load(path) as file:
            core.load_sonnet_variables({name: file[name] for name in file.files})
