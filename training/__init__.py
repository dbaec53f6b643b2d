"""The training engine behind all training scripts.

Import it before torch, because torch's threads read GOMP_SPINCOUNT when torch is loaded.
"""

import importlib.metadata
import os
import sys

OLDEST_TORCH = "2.6"  # as in requirements.txt

_found = importlib.metadata.version("torch")
if [int(part) for part in _found.split(".")[:2]] < [int(part) for part in OLDEST_TORCH.split(".")]:
    print(
        f"error: torch {_found} is installed, but torch {OLDEST_TORCH} or newer is required. Run: "
        "pip install -r requirements.txt",
        file=sys.stderr,
    )
    sys.exit(2)

# How long an idle thread spins before it sleeps. On a busy machine the default, about a millisecond, takes
# processor time from other threads: a step then takes two to thirty times as long. On a quiet machine the
# shorter spin costs nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
