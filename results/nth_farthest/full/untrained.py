"""Pictures of the attention in an untrained core of the paper's size, with and without a memory scale.

    python results/nth_farthest/full/untrained.py
"""

import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[2]))
from plot_runs import draw_attention  # noqa: E402

from nth_farthest import NthFarthestModel, make_batch  # noqa: E402

inputs, _ = make_batch(1, 8, 16, torch.Generator().manual_seed(1))
for scale, name in ((1.0, "untrained.png"), (16.0, "untrained-memory-scale-16.png")):
    torch.manual_seed(1)
    draw_attention(NthFarthestModel(memory_scale=scale).attention(inputs)[0].numpy(), FOLDER / name)
