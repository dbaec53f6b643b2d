"""`pip install .` installs the three files of the core and nothing else."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from training import runs

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
USE = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from relational_rnn_fast import FastRelationalMemory
core = FastRelationalMemory(mem_slots=2, head_size=3, input_size=5, num_heads=4)
print(*core.step(torch.zeros(7, 5), core.initial_state(7)).shape)
"""


def run(*command, folder):
    ran = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_wheel_has_the_three_files_of_the_core_and_works_alone(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77")
    source = tmp_path / "source"
    source.mkdir()
    for path in (*ROOT.glob("*.*"), ROOT / "LICENSE"):  # a build writes into its folder
        if path.is_file():
            shutil.copy(path, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index"]
    run(*PIP, "wheel", ".", *options, "--wheel-dir", tmp_path, folder=source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        content = {path: archive.read(path).decode() for path in archive.namelist()}
    modules = {path for path in content if ".dist-info/" not in path}
    assert modules == {f"relational_rnn_{name}.py" for name in ("general", "fast", "checks")}
    (metadata,) = (text for path, text in content.items() if path.endswith("/METADATA"))
    required = re.findall("^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE)
    assert required == [line for line in (ROOT / "requirements.txt").read_text().split() if "torch" in line]
    for text in (metadata, (ROOT / "CITATION.cff").read_text(encoding="utf-8").replace('"', "")):
        assert re.search(f"^version: {runs.VERSION}$", text, flags=re.MULTILINE | re.IGNORECASE)
    run(*PIP, "install", wheel, "--no-deps", "--no-index", "--target", tmp_path / "clean", folder=tmp_path)
    assert run(sys.executable, "-I", "-c", USE, tmp_path / "clean", folder=tmp_path) == "7 2 12\n"
