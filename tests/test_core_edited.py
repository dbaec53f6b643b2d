"""The project after an edit of the readable core, which trains, and with a torch that is too old."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EQ_7 = "after = input_gate * candidate + forget_gate * memory"


def train(project, corpus, folder):
    """Run train_rmc.py for an epoch; return its validation loss and its warnings about the core."""
    sizes = (
        "--emsize 12 --headsize 5 --numheads 2 --keysize 3 --batch-size 14 --bptt 15 --epochs 1 --threads 1"
    )
    where = ["--data", str(corpus), "--runs-folder", str(folder)]
    command = [sys.executable, str(project / "train_rmc.py"), *sizes.split(), *where]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (log,) = folder.glob("*/log.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "valid"]
    return losses, re.findall("warning: FastRelationalMemory runs .*", done.stderr)


def copy_project(copy):
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    for package in ROOT.glob("*/__init__.py"):
        shutil.copytree(package.parent, copy / package.parent.name)


def replace(path, *changes):
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)


@pytest.mark.timeout(300)
def test_edit_of_the_readable_core_trains_with_one_warning(corpus_folder, tmp_path):
    copy = tmp_path / "project"
    copy_project(copy)
    before, quiet = train(copy, corpus_folder, tmp_path / "before")
    replace(copy / "relational_rnn_general.py", (EQ_7, EQ_7.replace("input_gate", "(1 - forget_gate)")))
    after, warned = train(copy, corpus_folder, tmp_path / "after")
    assert not quiet and len(warned) == 1
    assert "relational_rnn_general.py and relational_rnn_fast.py compute different results" in warned[0]
    assert len(after) == len(before) == 1 and abs(after[0] - before[0]) > 1e-4


def test_example_of_the_page_on_changes_is_fast_again_after_its_port(tmp_path):
    copy_project(tmp_path / "project")
    page = (ROOT / "docs" / "change_the_math.md").read_text()
    (command,) = re.findall(r'^    python -c "(.*)"$', page, re.MULTILINE)

    def obstacle():
        options = {"cwd": tmp_path / "project", "capture_output": True, "text": True, "check": True}
        return subprocess.run([sys.executable, "-c", command], **options).stdout

    tanh = "        if self.gate_style is not None:\n            candidate = torch.tanh(candidate)\n"
    replace(tmp_path / "project" / "relational_rnn_general.py", (tanh, ""))
    assert "compute different results" in obstacle()
    replace(
        tmp_path / "project" / "relational_rnn_fast.py",
        ("candidate, squashed = _tanh(z), ", "candidate, squashed = z, "),
        ("aten.tanh_backward(grad_z * input_gate, candidate)", "grad_z * input_gate"),
    )
    assert obstacle() == "None\n"


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_torch_below_the_one_in_requirements_is_named(script, tmp_path):
    requirements = (ROOT / "requirements.txt").read_text()
    major, minor = re.search(r"^torch>=(\d+)\.(\d+)$", requirements, re.MULTILINE).groups()
    old = f"{major}.{int(minor) - 1}.9"
    found = tmp_path / f"torch-{old}.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {old}+cpu\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        f"error: torch {old}+cpu is installed, but torch {major}.{minor} or newer is required. Run: "
        "pip install -r requirements.txt\n"
    )
