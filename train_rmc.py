"""Train a word-level language model on the relational memory core of Santoro et al. 2018 (arXiv:1806.01822).

Examples: python train_rmc.py --recipe tiny
          python train_rmc.py --cuda

Every run writes a folder under runs/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from relational_rnn_models import RelationalMemoryLM
from training import distributed, flags, lm_flags, lm_training
from training.core_flags import add_core_flags, core_arguments

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
    # 10,753,158 parameters.
    "wikitext2": {"emsize": 184, "headsize": 176, "lr": 0.001, **lm_flags.WIKITEXT2},
    # 10,665,278 parameters.
    "wikitext2-regularised": {
        "emsize": 256,
        "headsize": 120,
        "attmlplayers": 2,
        "dropout_candidate": 0.1,
        # A tenth of the LSTM's: what it acts on here is not held within -1 and 1 by a tanh.
        "ar": 0.2,
        # Its softmax is tied without being asked.
        **{flag: value for flag, value in lm_flags.WIKITEXT2_REGULARISED.items() if flag != "tied"},
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = argparse.ArgumentParser(
        prog=f"{SCRIPT}.py", description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False
    )
    core = parser.add_argument_group("relational memory core")
    core.add_argument(
        "--emsize", type=flags.positive_int, default=192, metavar="UNITS", help="size of a word's embedding"
    )
    add_core_flags(core, memslots=1, headsize=192, numheads=4, attmlplayers=3, keysize=64)
    lm_flags.add_dropout_flags(
        core, "the memory's gates and the queries, keys and values", "what is written into the memory"
    )
    lm_flags.add_flags(parser, RECIPES)
    return parser


def build_model(args: argparse.Namespace, vocab_size: int, cutoffs: list[int] | None) -> RelationalMemoryLM:
    """The model that the arguments describe, with random weights."""
    return RelationalMemoryLM(
        vocab_size,
        embedding_size=args.emsize,
        cutoffs=cutoffs,
        **core_arguments(args),
        **lm_flags.dropouts(args),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    return lm_training.run(build_parser(), argv, SCRIPT, "rmc", build_model, RECIPES)


if __name__ == "__main__":
    distributed.run_script(main, lm_training.LOWER_MEMORY)
