"""Random input by hypothesis: flags, run folders, logs, checkpoints: an answer, never an accident.

In the suite a few dozen inputs each. For a long hunt:

    FUZZ_EXAMPLES=20000 python -m pytest -q tests/test_fuzz.py --timeout 0
"""

import contextlib
import importlib
import io
import json
import os
import pickle
import zipfile

import plot_runs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults import crafted

import data_utils
from rnn_models import RNNLM
from training import checkpoints, flags, lm_training, runs
from training.console import UserError

LONG = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SCRIPTS = ("train_rmc", "train_rnn", "train_nth_farthest", "generate_rmc", "plot_runs", "benchmark")


def fuzz(examples):
    """So many inputs, or as many as FUZZ_EXAMPLES asks for."""
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=LONG or examples, deadline=None, suppress_health_check=unhurried)


# ---- flags

PARSERS = {name: importlib.import_module(name).build_parser() for name in SCRIPTS}
ODD = st.one_of(
    st.sampled_from(["0", "-1", "1", "1e9", "nan", "inf", "", "1.5", "x", "--", "-", "-x"]),
    st.sampled_from(["\0", "½", "٣", "1_0"]),
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(str),
)


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from(SCRIPTS))
    known = [option for action in PARSERS[name]._actions for option in action.option_strings]
    known = [option for option in known if option not in ("-h", "--help")]
    words = []
    for _ in range(draw(st.integers(0, 6))):
        flag = draw(st.one_of(st.sampled_from(known), st.sampled_from(known), ODD))
        value = draw(st.one_of(st.none(), ODD))
        words += [flag] if value is None else draw(st.sampled_from([[flag, value], [f"{flag}={value}"]]))
    return name, words


@fuzz(150)
@given(command_lines())
def test_any_command_line_is_read_or_refused(line):
    name, words = line
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            args = PARSERS[name].parse_args(words)
        except SystemExit as end:
            assert end.code == 2 and err.getvalue().count("error: ") >= 1
            return
    for action in PARSERS[name]._actions:
        if hasattr(args, action.dest) and action.type is not None and action.option_strings:
            value = getattr(args, action.dest)
            for one in value if isinstance(value, list) else [value]:
                assert one == one, action.dest  # no NaN comes through


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@fuzz(60)
@given(
    change=st.dictionaries(st.sampled_from(["lr", "seed", "emsize", "cutoffs", "data", "dropout"]), JSON),
    whole=JSON,
)
def test_any_args_json_is_read_or_refused(change, whole, tmp_path):
    parser = PARSERS["train_rmc"]
    good = {"script": "train_rmc", "arguments": vars(parser.parse_args([]))}
    (tmp_path / "log.jsonl").write_text("")
    for record in ({**good, "arguments": {**good["arguments"], **change}}, whole):
        (tmp_path / "args.json").write_text(json.dumps(record))
        with contextlib.suppress(UserError):
            args = flags.parse_arguments(parser, ["--resume", str(tmp_path)], "train_rmc")
            assert args.lr > 0 and args.emsize >= 1 and 0 <= args.dropout < 1
        with contextlib.suppress(UserError):
            plot_runs.read_run(tmp_path)


LINES = st.one_of(
    st.binary(max_size=30),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"event": JSON, "step": JSON}).map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"event": st.just("resume"), "step": JSON}).map(lambda v: json.dumps(v).encode()),
)


@fuzz(80)
@given(lines=st.lists(LINES, max_size=6))
def test_any_log_is_read(lines, tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    for event in runs.read_log(tmp_path / "log.jsonl"):
        assert isinstance(event, dict)


# ---- checkpoints

PLAIN = b"(.0123456789:;=@}]){aebdhjlopqrstuN\x80\x81\x85\x86\x87\x88\x89\x8c\x8f\x90\x91\x93\x94\x97\x98"
OPCODES = st.sampled_from(
    [bytes([code]) for code in PLAIN]
    + [b"K\x01", b"J\xff\xff\xff\x7f", b"\x8a\x01\x05", b"X\x01\0\0\0a", b"\x8c\x01a", b"h\0", b"q\0"]
    + [b"\x96" + (5).to_bytes(8, "little") + b"abcde", b"cbuiltins\neval\n", b"cos\nsystem\n"]
    # Lengths and numbers of which there is much less than they claim.
    + [b"\x96" + (2**50).to_bytes(8, "little"), b"\x8e" + (2**50).to_bytes(8, "little")]
    + [b"\x8b\xff\xff\xff\x7f"]
)
PROGRAMS = st.lists(OPCODES, max_size=25).map(lambda parts: b"\x80\x05" + b"".join(parts) + b".")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint, and the bytes of its file."""
    path = tmp_path_factory.mktemp("checkpoint") / "c.pt"
    model = RNNLM(4, embedding_size=3, hidden_size=3)
    vocabulary = data_utils.Vocabulary(["a", "b", "c", "<eos>"])
    checkpoints.save_checkpoint(path, lm_training.describe_model("rnn", model, vocabulary))
    return path, path.read_bytes(), checkpoints.load_checkpoint(path)


def check_checkpoint(path):
    """Reads it and builds the model; True unless a UserError of one line says no."""
    try:
        lm_training.load_model(checkpoints.load_checkpoint(path))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 900
        return False
    return True


@fuzz(100)
@given(data=st.data())
def test_any_damage_to_a_checkpoint_is_refused_or_harmless(data, checkpoint):
    path, whole, expected = checkpoint
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged)))
        kind = data.draw(st.sampled_from(["flip", "insert", "cut", "swap", "end"]))
        if kind == "flip" and place < len(damaged):
            damaged[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "insert":
            damaged[place:place] = data.draw(st.binary(max_size=20))
        elif kind == "cut":
            del damaged[place : place + data.draw(st.integers(1, 50))]
        elif kind == "swap":
            other = data.draw(st.integers(0, len(damaged)))
            damaged[place : place + 8], damaged[other : other + 8] = (
                damaged[other : other + 8],
                damaged[place : place + 8],
            )
        else:
            del damaged[place:]
    path.write_bytes(damaged)
    if check_checkpoint(path):
        found = checkpoints.load_checkpoint(path)
        assert found["words"] == expected["words"]
        for name, value in expected["model"].items():
            assert torch.equal(value, found["model"][name])


@fuzz(100)
@given(program=PROGRAMS)
def test_any_pickle_program_as_a_checkpoint_is_refused(program, checkpoint):
    path = checkpoint[0]
    path.write_bytes(crafted(program.replace(b"\x80\x05", b"\x80\x02", 1)))
    assert not check_checkpoint(path)


TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64, torch.bfloat16]),
)
VALUES = (
    JSON
    | TENSORS
    | st.sampled_from([10**9, 10**15, 2**70, -1, float("nan"), (), b"x", torch.ones(1).expand(9)])
)


@fuzz(100)
@given(data=st.data())
def test_any_contents_of_a_checkpoint_are_refused_or_a_model(data, checkpoint):
    path, _, good = checkpoint
    contents = {key: dict(value) if isinstance(value, dict) else value for key, value in good.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        place = contents
        if data.draw(st.booleans()):
            inner = contents[data.draw(st.sampled_from(["config", "model"]))]
            place = inner if isinstance(inner, dict) and inner else contents
        place[data.draw(st.sampled_from(sorted(place)) | st.text(max_size=4))] = data.draw(VALUES)
    torch.save(contents, path)
    check_checkpoint(path)


def test_the_archives_made_here_are_read_when_nothing_is_wrong_with_them(checkpoint):
    """Else all of the above would be refused for the wrong reason."""
    path, whole, _ = checkpoint
    path.write_bytes(whole)
    assert check_checkpoint(path)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith("data.pkl"))
        body = archive.read(name)
    assert crafted(body) != whole and zipfile.is_zipfile(io.BytesIO(crafted(body)))
    path.write_bytes(crafted(pickle.dumps({"format": checkpoints.CHECKPOINT_FORMAT}, protocol=2)))
    assert checkpoints.load_checkpoint(path) == {"format": checkpoints.CHECKPOINT_FORMAT}
