"""train_nth_farthest.py with one idea of its curriculum left out, named by the environment variable WITHOUT.

length  vectors keep their coordinates, and so become longer when dimensions are added
short   a stage of k vectors has K steps, of which the first K - k bring no vector
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training import distributed  # noqa: E402

import torch  # noqa: E402

import tasks.nth_farthest  # noqa: E402
import train_nth_farthest  # noqa: E402

make_batch = tasks.nth_farthest.make_batch
without_length = {"length": True, "short": False}[os.environ["WITHOUT"]]


def make_other_batch(batch_size, K, D, generator, device="cpu", shown=None):
    """Draw examples as make_batch does, without one of its ideas."""
    inputs, targets = make_batch(batch_size, K, D, generator, device, shown)
    if shown is not None and without_length:
        inputs[..., :D] *= (shown[1] / D) ** 0.5
    elif shown is not None:
        empty = inputs[:, :1].repeat(1, K - shown[0], 1)
        empty[..., : D + K] = 0  # the question stays
        inputs = torch.cat([empty, inputs], dim=1)
    return inputs, targets


tasks.nth_farthest.make_batch = make_other_batch
distributed.run_script(train_nth_farthest.main)
