"""Train an RMC with the first weight matrices of its core multiplied by a factor.

python results/initial_scale.py FACTOR train_rmc FLAGS
python results/initial_scale.py FACTOR train_nth_farthest FLAGS
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import training  # noqa: F401 (before torch)

import torch

factor, script = float(sys.argv[1]), importlib.import_module(sys.argv[2])
build_model = script.build_model


def build_scaled_model(*args):
    model = build_model(*args)
    with torch.no_grad():
        for parameter in model.core.parameters():
            if parameter.dim() > 1:
                parameter *= factor
    return model


script.build_model = build_scaled_model
sys.exit(script.main(sys.argv[3:]))
