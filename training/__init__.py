"""The training engine behind all training scripts.

Import it before torch: torch's threads read this variable when torch is loaded.
"""

import os

# How long an idle thread spins before it sleeps. The default, about a millisecond, burns the core of another
# process on a busy machine: a step then takes two to thirty times as long. A quiet machine loses nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
