"""What the memory holds while a model enters its plateau: three measurements in the first training steps.

    python results/nth_farthest/plateau_probe.py --lr 1e-3 --input-scale 3 --memory-scale 8

vector share    The part of the final memory's variance that comes from the vectors: half the mean squared
                change of the memory when a sequence gets other vectors but keeps labels and question, over
                its variance.
slots apart     The part of that variance which differs between the slots; 0 when all slots hold the same.
decodable       How well a linear map from the final memory gives each label's vector: R squared on sequences
                not used for the fit. 1: every vector can be read off, bound to its label; 0: none can.

All flags of train_nth_farthest.py are understood; the small task below is the default.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_nth_farthest as script  # noqa: E402
from nth_farthest import NthFarthestModel, make_batch  # noqa: E402
from training import devices  # noqa: E402

SMALL = ["--num-vectors", "3", "--num-dims", "1", "--memslots", "3", "--numheads", "4", "--headsize", "16"]
SMALL += ["--outputunits", "64", "--batch-size", "128", "--steps", "500", "--seed", "1", "--threads", "1"]
MARKS = (0, 50, 100, 200, 300, 400, 500, 1000, 2000, 5000)


@torch.no_grad()
def final_memory(model: NthFarthestModel, inputs: Tensor) -> Tensor:
    """What the core hands to the output layers, (B, features)."""
    if isinstance(model.core, torch.nn.LSTM):
        return model.core(model.scaled(inputs))[0][:, -1]
    pieces = model.scaled(inputs).split(1000)
    return torch.cat([model.core(piece, model.initial_memory(len(piece)))[0] for piece in pieces])


def vector_share(model: NthFarthestModel, examples: int = 2000) -> float:
    """Part of the final memory's variance that the vectors make, between 0 and 1."""
    K, D = model.num_vectors, model.num_dims
    generator = torch.Generator().manual_seed(7)
    inputs, _ = make_batch(examples, K, D, generator)
    others = inputs.clone()
    others[..., :D] = torch.rand(examples, K, D, generator=generator) * 2 - 1
    memory, changed = final_memory(model, inputs), final_memory(model, others)
    return ((memory - changed).square().mean() / 2 / memory.var(dim=0).mean()).item()


def slots_apart(model: NthFarthestModel, examples: int = 2000) -> float:
    """Part of the final memory's variance that differs between the slots, from 0 to 1; an LSTM's is NaN."""
    if isinstance(model.core, torch.nn.LSTM):
        return math.nan
    inputs, _ = make_batch(examples, model.num_vectors, model.num_dims, torch.Generator().manual_seed(7))
    memory = final_memory(model, inputs).unflatten(1, (model.core.mem_slots, -1))
    difference = memory - memory.mean(dim=1, keepdim=True)
    return (difference.var(dim=0).mean() / memory.var(dim=0).mean()).item()


def decodable(model: NthFarthestModel) -> float:
    """Mean R squared of a ridge regression from the final memory to the vectors, ordered by label."""
    K, D = model.num_vectors, model.num_dims
    examples = max(4000, 6 * model.head[0].in_features)
    inputs, _ = make_batch(examples, K, D, torch.Generator().manual_seed(5))
    positions = inputs[..., D : D + K].argmax(dim=1)  # (B, K): where each label is
    vectors = inputs[..., :D].gather(1, positions.unsqueeze(2).expand(-1, -1, D)).flatten(1).double()
    memory = torch.cat([final_memory(model, inputs), torch.ones(examples, 1)], dim=1).double()
    train = examples * 2 // 3
    a = memory[:train]
    penalty = 1e-3 * train * torch.eye(a.size(1), dtype=torch.float64)
    linear = torch.linalg.solve(a.T @ a + penalty, a.T @ vectors[:train])
    errors = (memory[train:] @ linear - vectors[train:]).square().mean(dim=0)
    return (1 - errors / vectors[train:].var(dim=0)).mean().item()


def main() -> None:
    """Trains as train_nth_farthest.py does and prints a row of measurements at every mark."""
    args = script.build_parser().parse_args([*SMALL, *sys.argv[1:]])
    device = devices.choose_device(False, args.threads)
    devices.seed_everything(args.seed)
    trainer = script.Trainer(script.build_model(args), args, device)
    print("  step  accuracy  vector share  slots apart  decodable")
    for step in range(args.steps + 1):
        if step in MARKS or step == args.steps:
            row = [measure(trainer.model) for measure in (vector_share, slots_apart, decodable)]
            print("{:6}  {:8.3f}  {:12.3f}  {:11.3f}  {:9.3f}".format(step, trainer.test(), *row), flush=True)
        trainer.lr.fill_(script.learning_rate(step + 1, args))
        trainer.step()


if __name__ == "__main__":
    main()
