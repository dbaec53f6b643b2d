"""Train an RMC language model with the core's first weight matrices multiplied by a factor.

python results/wikitext2_pair/initial_scale.py FACTOR, then the flags of train_rmc.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import training  # noqa: F401 (before torch)

import torch

import train_rmc

factor = float(sys.argv[1])
build_model = train_rmc.build_model


def build_scaled_model(*args):
    model = build_model(*args)
    with torch.no_grad():
        for parameter in model.core.parameters():
            if parameter.dim() > 1:
                parameter *= factor
    return model


train_rmc.build_model = build_scaled_model
sys.exit(train_rmc.main(sys.argv[2:]))
