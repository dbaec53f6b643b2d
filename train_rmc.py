"""Train a word-level language model on the relational memory core of Santoro et al. 2018 (arXiv:1806.01822).

Examples: python train_rmc.py --recipe tiny
          python train_rmc.py --cuda

Every run writes a folder under runs/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lm_training
import runs
from relational_rnn_models import RelationalMemoryLM

SCRIPT = "train_rmc"

RECIPES = {
    # Some two minutes on a CPU; one thread is as fast as two for so small a model.
    "tiny": {
        "data": "tiny",
        "emsize": 128,
        "headsize": 32,
        "keysize": 32,
        "attmlplayers": 2,
        "forgetbias": 2.0,
        "dropout": 0.1,
        "lr": 0.0015,
        "schedule": "cosine",
        "clip": 1.0,
        "batch_size": 32,
        "bptt": 32,
        "epochs": 11,
        "threads": 1,
        # So short a split loses too much context where 32 columns start in the midst of a story.
        "eval_batch_size": 4,
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = argparse.ArgumentParser(
        prog=f"{SCRIPT}.py", description=__doc__, formatter_class=runs.HelpFormatter, allow_abbrev=False
    )
    core = parser.add_argument_group("relational memory core")
    core.add_argument(
        "--emsize", type=runs.positive_int, default=192, metavar="UNITS", help="size of a word's embedding"
    )
    core.add_argument(
        "--memslots", type=runs.positive_int, default=1, metavar="N", help="rows of the memory matrix"
    )
    core.add_argument(
        "--headsize",
        type=runs.positive_int,
        default=192,
        metavar="UNITS",
        help="value size of one attention head; a memory row has heads x this many units",
    )
    core.add_argument("--numheads", type=runs.positive_int, default=4, metavar="N", help="attention heads")
    core.add_argument(
        "--numblocks", type=runs.layer_count, default=1, metavar="N", help="attention blocks per time step"
    )
    core.add_argument(
        "--forgetbias",
        type=runs.finite_float,
        default=1.0,
        metavar="X",
        help="fixed bias of the forget gate, before the sigmoid",
    )
    core.add_argument(
        "--inputbias",
        type=runs.finite_float,
        default=0.0,
        metavar="X",
        help="fixed bias of the input gate, before the sigmoid",
    )
    core.add_argument(
        "--gatestyle",
        choices=("unit", "memory", "none"),
        default="unit",
        help="one gate per unit, one per memory row, or no gates",
    )
    core.add_argument(
        "--attmlplayers",
        type=runs.layer_count,
        default=3,
        metavar="N",
        help="layers of the MLP after the attention",
    )
    core.add_argument(
        "--keysize",
        type=runs.positive_int,
        default=64,
        metavar="UNITS",
        help="query and key size of one attention head",
    )
    lm_training.add_dropout_flags(core)
    lm_training.add_flags(parser, RECIPES)
    return parser


def build_model(args: argparse.Namespace, vocab_size: int, cutoffs: list[int] | None) -> RelationalMemoryLM:
    """The model that the arguments describe, with random weights."""
    return RelationalMemoryLM(
        vocab_size,
        embedding_size=args.emsize,
        mem_slots=args.memslots,
        head_size=args.headsize,
        num_heads=args.numheads,
        num_blocks=args.numblocks,
        forget_bias=args.forgetbias,
        input_bias=args.inputbias,
        gate_style=None if args.gatestyle == "none" else args.gatestyle,
        attention_mlp_layers=args.attmlplayers,
        key_size=args.keysize,
        cutoffs=cutoffs,
        **lm_training.dropouts(args),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    return lm_training.run(build_parser(), argv, SCRIPT, "rmc", build_model, RECIPES)


if __name__ == "__main__":
    runs.run_script(main, lm_training.LOWER_MEMORY)
