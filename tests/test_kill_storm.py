"""A short version of kill_storm.py, in a process of its own: one that has no threads and can fork."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nothing_is_lost_to_a_few_kills():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill_storm.py"), "--kills", "14", "--seed", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^in all +14$", done.stdout, re.MULTILINE)
    assert "5 training runs finished and equal" in done.stdout
