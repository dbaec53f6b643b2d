"""Checkpoints: plain data, never half written; truncated and foreign files are rejected."""

import math
import os
import pickle
import random

from training import checkpoints, devices
from training.checkpoints import load_checkpoint, save_checkpoint
from training.console import UserError

import pytest
import torch

from data_utils import Vocabulary
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM
from tasks.language_modeling import describe_model, load_model

VOCABULARY = Vocabulary(["a", "b", "c", "<eos>", "ü"])


def sample_contents():
    return {"weights": torch.arange(7, dtype=torch.float32), "step": 3, "words": ["a", "ü"], "loss": math.inf}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The path, bytes and contents of a checkpoint of an LSTM."""
    path = tmp_path_factory.mktemp("good") / "best.pt"
    save_checkpoint(path, describe_model("rnn", RNNLM(5, embedding_size=3, hidden_size=2), VOCABULARY))
    return path, path.read_bytes(), load_checkpoint(path)


def read(path):
    """Return the model in a file, or None if it is rejected with one line."""
    try:
        return load_model(load_checkpoint(path))[0]
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 900
        return None


def assert_unchanged(model, contents):
    for name, value in model.state_dict().items():
        assert torch.equal(value, contents["model"][name])


# ---- writing


def test_round_trip_is_plain_data(tmp_path):
    path = tmp_path / "c.pt"
    states = devices.random_states(torch.device("cpu"))
    save_checkpoint(path, {**sample_contents(), "random": states, "folder": "caf\udce9"})
    again = load_checkpoint(path)
    assert torch.equal(again["weights"], sample_contents()["weights"])
    assert (again["step"], again["words"], again["loss"]) == (3, ["a", "ü"], math.inf)
    assert again["folder"] == "caf\udce9"


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_failed_write_warns_and_keeps_the_earlier_file(tmp_path, monkeypatch, capsys, failure):
    path = tmp_path / "last.pt"
    assert checkpoints.try_save_checkpoint(path, {"step": 1})

    def fail(contents, file):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    assert not checkpoints.try_save_checkpoint(path, {"step": 2})
    assert "the previous file is kept, training continues" in capsys.readouterr().err
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]
    assert not checkpoints.try_save_checkpoint(tmp_path / "gone" / "last.pt", {"step": 2})
    assert "there is no previous file, training continues" in capsys.readouterr().err
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        checkpoints.try_save_checkpoint(path, {"step": 2})


# ---- damaged and foreign files


def test_truncated_and_foreign_files_are_rejected(good, tmp_path):
    path, whole, _ = good
    damaged = tmp_path / "damaged.pt"
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        assert read(damaged) is None
    for contents in (b"hello", b"\x80\x04.", b"PK\x03\x04" + bytes(100), random.Random(1).randbytes(5000)):
        damaged.write_bytes(contents)
        assert read(damaged) is None
    torch.save([1, 2], damaged)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(damaged)
    with pytest.raises(UserError, match="there is no checkpoint .*none.pt"):
        load_checkpoint(tmp_path / "none.pt")


class Trap:
    """Unpickles to a call that makes a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("writer", ["torch", "legacy torch", "pickle"])
def test_reading_runs_no_code(tmp_path, writer):
    path, mark = tmp_path / "evil.pt", tmp_path / "mark"
    contents = {"format": 1, "model": Trap(mark)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(path)
    assert not mark.exists()


# ---- contents


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["config"].update(a_later_option=1),
        lambda c: c.pop("config"),
        lambda c: c.update(model={}),
        lambda c: c["model"].update(strange=torch.zeros(2)),
        lambda c: c["model"].update({next(iter(c["model"])): torch.zeros(2)}),
        lambda c: c.update(kind="lstm"),
    ],
)
def test_parts_that_do_not_fit_are_rejected(change, tmp_path):
    model = RelationalMemoryLM(5, embedding_size=3, mem_slots=2, head_size=2, num_heads=2, key_size=3)
    contents = describe_model("rmc", model, VOCABULARY)
    contents = {**contents, "config": dict(contents["config"]), "words": list(contents["words"])}
    save_checkpoint(tmp_path / "c.pt", contents)
    assert read(tmp_path / "c.pt") is not None
    change(contents)
    save_checkpoint(tmp_path / "c.pt", contents)
    assert read(tmp_path / "c.pt") is None
