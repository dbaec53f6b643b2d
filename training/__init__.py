"""The training engine behind all training scripts.

Import it before torch, because torch's threads read GOMP_SPINCOUNT when torch is loaded.
"""

import os

# How long an idle thread spins before it sleeps. On a busy machine the default, about a millisecond, takes
# processor time from other threads: a step then takes two to thirty times as long. On a quiet machine the
# shorter spin costs nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
