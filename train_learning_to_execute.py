"""Train a relational memory core, or an LSTM, on the paper's task "Learning to Execute" (arXiv:1806.01822).

The input is a short program, one character per step; the output is its result. The defaults are the paper's
settings: numbers of 5 digits, nesting 2, batch 128, Adam at 1e-3, 200,000 steps.

Examples: python train_learning_to_execute.py --program-kind control --show 5
          python train_learning_to_execute.py --recipe reverse --model lstm
          python train_learning_to_execute.py --program-kind program --cuda
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from training import distributed, flags
from training.distributed import Processes
from training.flags import option
from training.muon import OPTIMIZERS
from training.script import Script, open_best, run
from training.trainer import Trainer

import torch

import tasks.learning_to_execute as task
from tasks.core_flags import add_core_flags, core_arguments
from tasks.learning_to_execute import SCRIPT, ExecuteModel, LearningToExecute

# One to five minutes on a quiet CPU core. The two models have equally many parameters.
SMALL = {"memslots": 4, "numheads": 2, "headsize": 32, "nhid": 56, "outputlayers": 2, "outputunits": 128}
SMALL |= {"nesting": 1, "steps": 1500, "batch_size": 64, "lr": 6e-3, "optimizer": "muon"}
# The paper has one gate per memory row; results/learning_to_execute/trials.txt compares both.
SMALL |= {"gatestyle": "unit", "warmup": 50, "schedule": "cosine", "clip": 1.0, "threads": 1}
LENGTHS = {"addition": 3, "control": 2, "program": 2, "copy": 10, "reverse": 10, "double": 10}
RECIPES = {kind: {**SMALL, "program_kind": kind, "length": length} for kind, length in LENGTHS.items()}
RECIPES["addition"] |= {"lr": 2e-3, "steps": 4000}
RESUME_MAY_CHANGE = frozenset({"steps", "show"})


def build_parser() -> flags.Parser:
    """Return the script's command line."""
    parser = flags.Parser(SCRIPT, __doc__)
    flags.add_recipe_flag(parser, RECIPES)
    # fmt: off
    group = parser.add_argument_group("task")
    option(group, "--program-kind", None, "program", None, "what the programs do", choices=task.PROGRAM_KINDS)
    option(group, "--nesting", flags.whole_number(1, len(task.VARIABLES)), 2, "N",
           "operations in a program, each on the result of the last")
    option(group, "--length", flags.layer_count, 5, "DIGITS", "digits of a number, or of the string to copy")
    option(group, "--difficulty", None, "mix", None,
           "nesting and length of training examples: uniform from 1 to the values above (mix), these values "
           "(full), or half of each (combined); all test examples are full", choices=task.DIFFICULTIES)
    option(group, "--test-examples", flags.positive_int, 1280, "N",
           "fixed examples that every report is measured on; the final figures are from "
           f"{task.FINAL_TEST_FACTOR} times as many")
    option(group, "--show", flags.positive_int, None, "N",
           "only print N examples; with --evaluate, the model's answers too")
    group = parser.add_argument_group("model")
    option(group, "--model", None, "rmc", None, "relational memory core, or LSTM", choices=task.MODELS)
    add_core_flags(group, task.CORE_DEFAULTS)
    option(group, "--nhid", flags.positive_int, 1024, "N", "hidden units of each of the two LSTM layers")
    option(group, "--outputlayers", flags.layer_count, 4, "N", "ReLU layers between the core and the logits")
    option(group, "--outputunits", flags.positive_int, 256, "N", "units of each of these layers")
    # fmt: on
    flags.add_step_flags(parser.add_argument_group("training"), steps=200_000, batch_size=128, lr=1e-3)
    flags.add_run_flags(parser)
    return parser


def build_model(args: argparse.Namespace) -> ExecuteModel:
    """Return the model that the flags describe, with random weights."""
    head = {"head_layers": args.outputlayers, "head_units": args.outputunits}
    return ExecuteModel(args.model, args.nhid, **head, **core_arguments(args))


def build(args: argparse.Namespace, device: torch.device, processes: Processes) -> Trainer:
    """Return the trainer that the arguments describe."""
    model = build_model(args).to(device)
    training = LearningToExecute(model, args, device, processes)
    print(f"task: {args.program_kind}; characters right with a constant answer: {training.chance:.1%}")
    optimizer = functools.partial(OPTIMIZERS[args.optimizer], model.parameters())
    return Trainer(training, args, device, processes, optimizer)


def evaluate_run(script: Script, args: argparse.Namespace, given: Mapping[str, Any]) -> int:
    """Measure the best model of a run with the arguments of the run, on the device of this command line."""
    of_run, device, best = open_best(script, args)
    task.measure(best, of_run, device, args.show or 0)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = build_parser()
    given = parser.given(argv)
    if "show" in given and "evaluate" not in given:
        args = flags.parse(parser, SCRIPT, given, RECIPES, RESUME_MAY_CHANGE)
        task.show_examples(args, task.write_programs(args, args.show, random.Random(task.FINAL_TEST_SEED)))
        return 0
    return run(Script(SCRIPT, parser, build, evaluate_run, RECIPES, RESUME_MAY_CHANGE), argv)


if __name__ == "__main__":
    distributed.run_script(main, "--batch-size (or raise --accumulate) or the sizes of the model")
