"""The script on the page "Add a task": it learns, resumes and is evaluated, in two processes too."""

import importlib.util
import re
from pathlib import Path

from training import runs

import pytest
from same_runs import after_step, assert_same_run
from test_distributed import ends, two_processes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "add_a_task.md"


@pytest.fixture
def script(tmp_path):
    (code,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    path = tmp_path / "train_counting.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("train_counting", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns_and_is_evaluated(script, tmp_path, capsys):
    assert script.main(["--runs-folder", str(tmp_path), "--name", "ones"]) == 0
    events = runs.read_log(tmp_path / "ones" / "log.jsonl")
    assert events[0]["accuracy"] < 0.9 and events[-1]["accuracy"] == 1
    assert script.main(["--evaluate", str(tmp_path / "ones")]) == 0
    assert "256 of 256 sequences" in capsys.readouterr().out


def test_resume_equals_uninterrupted(script, tmp_path, monkeypatch):
    argv = ["--steps", "30", "--log-interval", "7", "--name", "run", "--runs-folder"]
    assert script.main([*argv, str(tmp_path / "whole")]) == 0
    after_step(monkeypatch, 17)
    assert script.main([*argv, str(tmp_path / "parts")]) == 130
    assert script.main(["--resume", str(tmp_path / "parts" / "run")]) == 0
    assert_same_run(tmp_path / "whole" / "run", tmp_path / "parts" / "run")


def test_two_processes_train_one_model(script, tmp_path):
    argv = ["--steps", "100", "--log-interval", "25", "--name", "ones"]
    with two_processes(tmp_path, script.__file__, *argv) as processes:
        statuses, _, errors = ends(processes)
    assert statuses == [0, 0], errors
    events = runs.read_log(tmp_path / "runs" / "ones" / "log.jsonl")
    assert events[-1]["accuracy"] > 0.8  # the correct ones of a single process are at most a half
