"""A short kill_storm.py, in a new process: one without threads, which can fork."""

import re
import subprocess
import sys
from pathlib import Path


def test_killed_runs_resume_to_the_same_end():
    command = [sys.executable, str(Path(__file__).with_name("kill_storm.py")), "--kills", "8", "--seed", "2"]
    command += ["--kinds", "LSTM, cosine", "Nth farthest, RMC"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^in all +8$", done.stdout, re.MULTILINE) and "writing a checkpoint" in done.stdout
    assert int(re.search(r"^(\d+) runs finished, each equal", done.stdout, re.MULTILINE)[1]) >= 2
