"""The flags that both language models share, and the common part of their recipes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from training import flags
from training.console import UserError
from training.flags import option, switch
from training.schedule import PATIENCE

from layers.softmax import choose_cutoffs


def add_flags(parser: flags.Parser, recipes: Sequence[str]) -> None:
    """Add the flags that do not depend on the model, and those of every training script."""
    flags.add_recipe_flag(parser, recipes)
    # fmt: off
    data = parser.add_argument_group("data")
    option(data, "--data", None, "./data/wikitext-2", "FOLDER",
           "folder, or subfolder of data/, with train.txt, valid.txt and test.txt")
    option(data, "--vocab-from", None, "all", None,
           "build the vocabulary from all three texts, or from train.txt alone with <unk> for other words",
           choices=("all", "train"))
    softmax = parser.add_argument_group("softmax")
    switch(softmax, "--adaptivesoftmax",
           "adaptive softmax: much less work and memory for a large vocabulary, slightly higher perplexity")
    option(softmax, "--cutoffs", flags.positive_int, None, "WORDS",
           "vocabulary sizes at which adaptive softmax starts a new cluster, increasing (default: chosen to "
           "fit the vocabulary)", nargs="+")
    training = parser.add_argument_group("training")
    option(training, "--lr", flags.positive_float, 0.001, "X", "peak learning rate of Adam")
    option(training, "--schedule", None, "plateau", None,
           f"plateau: halve the learning rate after more than {PATIENCE} epochs without a better validation "
           "loss; cosine: lower it step by step, to 0 at the end of the last epoch",
           choices=("plateau", "cosine"))
    option(training, "--warmup", flags.non_negative_int, 0, "STEPS",
           "steps in which the learning rate grows from 0")
    option(training, "--clip", flags.non_negative_float, 0.1, "NORM",
           "clip the gradient to this L2 norm; 0 = no clipping")
    option(training, "--weight-decay", flags.non_negative_float, 0.0, "X",
           "decoupled weight decay of the matrices (AdamW, arXiv:1711.05101): each step subtracts learning "
           "rate x this x weight")
    option(training, "--average", None, "none", None,
           "ema: also keep an exponential moving average of the weights, evaluate it too, and save it as "
           "best.pt where it is better", choices=("none", "ema"))
    option(training, "--average-decay", flags.fraction, 0.999, "X",
           "ema: decay of the moving average per step")
    option(training, "--epochs", flags.positive_int, 100, "N",
           "passes over the training text; can be changed with --resume")
    option(training, "--batch-size", flags.positive_int, 64, "N",
           "number of parallel streams that the training text is split into")
    option(training, "--bptt", flags.positive_int, 100, "TOKENS",
           "length of truncated backpropagation, in tokens")
    option(training, "--eval-batch-size", flags.positive_int, 32, "N",
           "number of parallel streams in evaluation; fewer lose less context; --evaluate uses the "
           "value of the run by default")
    option(training, "--evaluate", None, None, "CHECKPOINT_OR_RUN",
           "only score a checkpoint, or the best model of a run folder, on valid and test; another text "
           "requires --data and a run with --vocab-from train")
    # fmt: on
    flags.add_run_flags(parser)


def add_dropout_flags(
    group: argparse._ArgumentGroup, recurrent_matrices: str, candidate: str, between_layers: bool = False
) -> None:
    """Add --dropout, the flags that override it in one place, and further kinds of dropout.

    `recurrent_matrices` and `candidate` name in the help what weight drop and recurrent dropout act on.
    """

    # fmt: off
    def probability(flag: str, default: float | None, text: str) -> None:
        option(group, flag, flags.fraction, default, "P", text)

    probability("--dropout", 0.5, "dropout probability, where the flags below do not override it")
    probability("--dropout-input", None, "dropout of the embedded input (default: --dropout)")
    if between_layers:
        probability("--dropout-hidden", None, "dropout between the layers (default: --dropout)")
    probability("--dropout-output", None, "dropout of the output before the softmax (default: --dropout)")
    group.add_argument(
        "--locked-dropout", action=argparse.BooleanOptionalAction, default=False,
        help="the above use one mask for all steps of a window (variational dropout, arXiv:1512.05287)")
    probability("--dropout-words", 0.0,
                "probability of dropping a word of the vocabulary from the input of a full window "
                "(arXiv:1512.05287)")
    probability("--dropout-weights", 0.0,
                f"weight drop of {recurrent_matrices}, one mask per window (arXiv:1708.02182)")
    probability("--dropout-candidate", 0.0,
                f"recurrent dropout of {candidate}, one mask per window (applied as in arXiv:1603.05118)")
    # fmt: on


def dropouts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the dropout flags as arguments of the models; --dropout is the default of those without one."""
    given = {name: value for name, value in vars(args).items() if name.startswith(("dropout_", "locked_"))}
    return {name: args.dropout if value is None else value for name, value in given.items()}


def choose_softmax(args: argparse.Namespace, vocab_size: int) -> list[int] | None:
    """Return the cutoffs of the adaptive softmax, or None for the full softmax."""
    if not args.adaptivesoftmax:
        if args.cutoffs:
            raise UserError("--cutoffs requires --adaptivesoftmax. Add it, or omit --cutoffs.")
        return None
    if args.cutoffs is not None:
        return args.cutoffs
    fitting = choose_cutoffs(vocab_size)
    print(f"adaptive softmax: cutoffs {' '.join(map(str, fitting))}, chosen for {vocab_size:,} words")
    return fitting


# ---- recipes

# What the recipes of both models for data/tiny have in common.
TINY = {
    "data": "tiny", "dropout": 0.1, "schedule": "cosine", "clip": 1.0, "batch_size": 32, "bptt": 32,
    "epochs": 11, "eval_batch_size": 4,  # the splits are short: 32 streams would lose too much context
    "threads": 1,  # more gain nothing with operations this small
}  # fmt: skip

# What the recommended recipes for WikiText-2 have in common: a few epochs of many small steps, little
# dropout, and an average of the weights. Sizes and learning rates are those of the best runs in
# results/wikitext2_pair (with --bf16; eight epochs of the LSTM).
WIKITEXT2 = {
    "dropout": 0.3, "batch_size": 32, "bptt": 35, "clip": 0.25, "average": "ema", "average_decay": 0.999,
    "epochs": 7,
}  # fmt: skip
