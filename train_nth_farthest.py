"""Train a relational memory core, or an LSTM, on the paper's task "Nth farthest" (arXiv:1806.01822).

The inputs are labeled vectors, one per step. The answer is the label of the n-th farthest from the vector
labeled m. The defaults are the paper's settings: 8 vectors of 16 dimensions, Adam at 1e-4, batch 1600.
Chance is 1/8. A model that has learned only that the nearest vector is m itself scores 2/8, and training
stays at that level for a long time. The paper's core reaches 91 %.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training import distributed, flags
from training.console import UserError
from training.distributed import Processes
from training.flags import option
from training.muon import OPTIMIZERS
from training.script import Script, open_best, run
from training.trainer import Trainer

import torch

from tasks.core_flags import add_core_flags, core_arguments
from tasks.nth_farthest import CORE_DEFAULTS, HOLD, MODELS, NthFarthest, NthFarthestModel, measure

SCRIPT = "train_nth_farthest"

RECIPES = {
    # The full task on one CPU thread, by way of easier tasks.
    "curriculum": {
        "curriculum": ["3x1", "3x2", "3x4", "3x16", "4x16", "5x16"],
        "curriculum_accuracy": 0.8,
        "curriculum_batch_size": 256,
        "batch_size": 512,
        "numheads": 4,
        "headsize": 16,
        "outputunits": 128,
        "input_scale": 1.5,
        "memory_scale": 8.0,
        "optimizer": "muon",
        "lr": 1e-3,
        "schedule": "cosine",
        "steps": 30_000,
        "log_interval": 200,
        "threads": 1,
    },
}

# ---- flags


def build_parser() -> flags.Parser:
    """Return the script's command line."""
    parser = flags.Parser(SCRIPT, __doc__)
    flags.add_recipe_flag(parser, RECIPES)
    # fmt: off
    task = parser.add_argument_group("task")
    option(task, "--num-vectors", flags.whole_number(2, 1000), 8, "K", "vectors in a sequence, and labels")
    option(task, "--num-dims", flags.positive_int, 16, "D", "dimensions of a vector")
    option(task, "--test-examples", flags.positive_int, 3200, "N",
           "number of fixed examples on which the test accuracy is measured")
    easier = parser.add_argument_group(
        "curriculum", "Easier tasks to train on first. The test accuracy is always that of the full task, in "
        "which a cosine schedule starts.")
    option(easier, "--curriculum", _stage, None, "KxD",
           "stages before the full task, as 3x1 for 3 vectors of which only the first dimension is not 0",
           nargs="+")
    option(easier, "--curriculum-accuracy", flags.probability, 0.8, "P",
           "a stage ends when the training accuracy over a log interval reaches this")
    option(easier, "--curriculum-batch-size", flags.positive_int, None, "N",
           "examples per step in these stages (default: --batch-size)")
    model = parser.add_argument_group("model")
    option(model, "--model", None, "rmc", None, "relational memory core, or LSTM baseline", choices=MODELS)
    add_core_flags(model, CORE_DEFAULTS)
    option(model, "--nhid", flags.positive_int, 512, "N", "hidden units of the LSTM")
    option(model, "--outputlayers", flags.layer_count, 4, "N", "ReLU layers between the core and the logits")
    option(model, "--outputunits", flags.positive_int, 256, "N", "units of each of these layers")
    option(model, "--input-scale", flags.positive_float, 1.0, "X",
           "factor on the vectors' coordinates; 1 in the paper")
    option(model, "--memory-scale", flags.positive_float, 1.0, "X",
           "factor on the identity matrix that is the initial memory; 1 in the paper")
    training = parser.add_argument_group("training")
    flags.add_step_flags(training, steps=500_000, batch_size=1600, lr=1e-4)
    option(training, "--target-accuracy", flags.probability, 1.0, "P",
           f"stop early when the test accuracy has reached this {HOLD} times in a row")
    # fmt: on
    flags.add_run_flags(parser)
    return parser


RESUME_MAY_CHANGE = frozenset({"steps", "target_accuracy", "curriculum_accuracy"})


def _stage(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"must be VECTORSxDIMENSIONS, such as 3x16, got {text!r}")
    return text


def build_model(args: argparse.Namespace) -> NthFarthestModel:
    """Return the model that the flags describe, with random weights."""
    return NthFarthestModel(
        **core_arguments(args),
        num_vectors=args.num_vectors,
        num_dims=args.num_dims,
        model=args.model,
        hidden_size=args.nhid,
        head_layers=args.outputlayers,
        head_units=args.outputunits,
        input_scale=args.input_scale,
        memory_scale=args.memory_scale,
    )


def curriculum(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Return vectors and dimensions of each stage; the last stage is the full task.

    Raises:
        UserError: a stage exceeds the full task.
    """
    full = (args.num_vectors, args.num_dims)
    stages = [tuple(map(int, stage.split("x"))) for stage in args.curriculum or ()]
    for vectors, dims in stages:
        if not (2 <= vectors <= full[0] and 1 <= dims <= full[1]):
            raise UserError(
                f"--curriculum has a stage {vectors}x{dims}, but the full task has {full[0]} vectors "
                f"(--num-vectors) of {full[1]} dimensions (--num-dims). Use 2 to {full[0]} vectors and 1 to "
                f"{full[1]} dimensions."
            )
    return [*stages, full]


# ---- the script


def build(args: argparse.Namespace, device: torch.device, processes: Processes) -> Trainer:
    """Return the trainer that the arguments describe."""
    model = build_model(args).to(device)
    chance, plateau = 1 / args.num_vectors, 2 / args.num_vectors
    print(
        f"task: {args.num_vectors} vectors, dimensions: {args.num_dims}; chance {chance:.1%}, "
        f"plateau {plateau:.1%}"
    )
    if args.curriculum_batch_size and not args.curriculum:
        raise UserError("--curriculum-batch-size requires --curriculum. Add it, or use --batch-size.")
    if args.curriculum_batch_size:
        processes.check_batch("--curriculum-batch-size", args.curriculum_batch_size, args.accumulate)
    task = NthFarthest(model, args, curriculum(args), device, processes)
    optimizer = functools.partial(OPTIMIZERS[args.optimizer], model.parameters())
    made = Trainer(task, args, device, processes, optimizer)
    if not task.in_full_task:
        made.lr.cosine_start = math.inf  # until the full task begins
    return made


def evaluate_run(script: Script, args: argparse.Namespace, given: Mapping[str, Any]) -> int:
    """Measure the best model of a run with the arguments of the run, on the device of this command line."""
    if distributed.from_environment().is_main:  # seconds of work, not worth sharing
        of_run, device, best = open_best(script, args)
        measure(best, Path(args.evaluate), of_run, device)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    script = Script(SCRIPT, build_parser(), build, evaluate_run, RECIPES, RESUME_MAY_CHANGE)
    return run(script, argv)


if __name__ == "__main__":
    distributed.run_script(
        main, "--batch-size (or raise --accumulate), --test-examples or the sizes of the model"
    )
