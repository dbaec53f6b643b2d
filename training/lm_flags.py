"""The flags that both language models share, what they mean together, and recipes (named sets of flags)."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from layers.softmax import choose_cutoffs
from training import distributed, flags
from training.console import UserError

# More than this many epochs in a row without a better validation loss halve the learning rate.
PATIENCE = 5
LR_FACTOR = 0.5

# Flags by name, as in the namespace, and their values: a recipe sets these and nothing else.
Recipes = Mapping[str, Mapping[str, Any]]


def add_flags(parser: argparse.ArgumentParser, recipes: Recipes) -> None:
    """Adds the flags that do not depend on the model: data, softmax, training, and those of every script."""
    parser.add_argument(
        "--recipe",
        choices=sorted(recipes),
        default=None,
        help="set several flags at once (printed at the start); flags given beside it win",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default="./data/wikitext-2",
        metavar="FOLDER",
        help="folder, or subfolder of data/, with train.txt, valid.txt and test.txt",
    )
    data.add_argument(
        "--vocab-from",
        choices=("all", "train"),
        default="all",
        help="build the vocabulary from all three splits, or from train.txt alone with <unk> for the rest",
    )

    softmax = parser.add_argument_group("softmax")
    softmax.add_argument(
        "--adaptivesoftmax",
        action="store_true",
        help="adaptive softmax: much less work and memory for a large vocabulary, slightly worse",
    )
    softmax.add_argument(
        "--cutoffs",
        type=flags.positive_int,
        nargs="+",
        default=None,
        metavar="WORDS",
        help="vocabulary sizes at which adaptive softmax starts a new cluster, increasing "
        "(default: chosen to fit the vocabulary)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--lr",
        type=flags.positive_float,
        default=0.001,
        help="Adam's learning rate, at its highest",
    )
    training.add_argument(
        "--embedding-lr",
        type=flags.positive_float,
        default=None,
        metavar="LR",
        help="that of the embedding's matrix, which tied is the softmax's too, in constant ratio to --lr "
        "through every schedule, warm-up and random windows (default: --lr)",
    )
    training.add_argument(
        "--schedule",
        choices=("plateau", "cosine"),
        default="plateau",
        help=f"plateau: halve the learning rate after more than {PATIENCE} epochs with no better validation "
        "loss; cosine: lower it step by step, to 0 at the end of the last epoch",
    )
    training.add_argument(
        "--warmup",
        type=flags.non_negative_int,
        default=0,
        metavar="STEPS",
        help="steps in which the learning rate first grows from 0",
    )
    training.add_argument(
        "--clip",
        type=flags.non_negative_float,
        default=0.1,
        metavar="NORM",
        help="largest L2 norm of the gradient; 0 = no clipping",
    )
    training.add_argument(
        "--weight-decay",
        type=flags.non_negative_float,
        default=0.0,
        metavar="X",
        help="decoupled weight decay of the matrices (AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101): "
        "each step takes learning rate x this of them",
    )
    training.add_argument(
        "--ar",
        type=flags.non_negative_float,
        default=0.0,
        metavar="X",
        help="activation regularisation: this times the mean square of the dropped output is added to the "
        "loss that is minimised, not to the one reported (Merity et al. 2017, arXiv:1708.01009)",
    )
    training.add_argument(
        "--tar",
        type=flags.non_negative_float,
        default=0.0,
        metavar="X",
        help="temporal activation regularisation (the same paper): likewise, of the differences between "
        "successive outputs of the recurrent part",
    )
    training.add_argument(
        "--average",
        choices=("none", "ema", "nt-asgd"),
        default="none",
        help="also average the weights, and evaluate and save the average where it is better. ema: "
        "exponential moving average; nt-asgd: plain mean from when validation stalls (Merity et al. 2018, "
        "arXiv:1708.02182; here of Adam's steps, not of SGD's)",
    )
    training.add_argument(
        "--average-decay",
        type=flags.fraction,
        default=0.999,
        metavar="X",
        help="ema: what is left of the average after a step",
    )
    training.add_argument(
        "--average-trigger",
        type=flags.positive_int,
        default=5,
        metavar="EPOCHS",
        help="nt-asgd: starts when the validation loss is above the best one of more than so many epochs ago",
    )
    training.add_argument(
        "--epochs",
        type=flags.positive_int,
        default=100,
        metavar="N",
        help="passes over the training text; with --resume it may be changed",
    )
    training.add_argument(
        "--batch_size",
        "--batch-size",
        type=flags.positive_int,
        default=64,
        metavar="N",
        help="columns that the training text is dealt to, read side by side",
    )
    training.add_argument(
        "--bptt",
        type=flags.positive_int,
        default=100,
        metavar="TOKENS",
        help="tokens per column in one step, through which gradients flow back",
    )
    training.add_argument(
        "--random-bptt",
        type=flags.non_negative_float,
        nargs="?",
        const=5.0,
        default=None,
        metavar="DEVIATION",
        help="windows of random length: normally distributed around --bptt, one in twenty around half of it, "
        "with this standard deviation (5 if not given); the learning rate of a step is scaled by its length "
        "(Merity et al. 2018). Only windows of exactly --bptt tokens run as a CUDA graph: few, unless the "
        "deviation is 0",
    )
    training.add_argument(
        "--eval-batch-size",
        "--eval_batch_size",
        type=flags.positive_int,
        default=32,
        metavar="N",
        help="columns in evaluation; 1 scores a split as one stream; not given, --evaluate takes the run's",
    )
    training.add_argument(
        "--evaluate",
        default=None,
        metavar="CHECKPOINT_OR_RUN",
        help="train nothing: score a checkpoint, or the best model of a run folder, on valid and test",
    )
    training.add_argument(
        "--state-lengths",
        type=flags.positive_int,
        nargs="+",
        default=None,
        metavar="WORDS",
        help="with --evaluate: also perplexity with the state reset every so many words, and by the words "
        "since a reset (figure 12 of arXiv:1806.01822); writes state_lengths.csv beside the checkpoint",
    )
    distributed.add_flags(parser)
    flags.add_precision_flags(flags.add_run_flags(parser))


def add_dropout_flags(
    parser: argparse._ArgumentGroup, recurrent_matrices: str, candidate: str, between_layers: bool = False
) -> None:
    """Adds --dropout, the flags that set one place apart from the others, and those of regularisation.py.

    `recurrent_matrices` and `candidate` say in the help what of the model weight drop and recurrent dropout
    act on.
    """
    parser.add_argument(
        "--dropout",
        type=flags.fraction,
        default=0.5,
        metavar="P",
        help="probability of dropping a unit, wherever the flags below do not say otherwise",
    )
    parser.add_argument(
        "--dropout-input",
        type=flags.fraction,
        default=None,
        metavar="P",
        help="of the embedded input (default: --dropout)",
    )
    if between_layers:
        parser.add_argument(
            "--dropout-hidden",
            type=flags.fraction,
            default=None,
            metavar="P",
            help="between the layers (default: --dropout)",
        )
    parser.add_argument(
        "--dropout-output",
        type=flags.fraction,
        default=None,
        metavar="P",
        help="of the output before the softmax (default: --dropout)",
    )
    parser.add_argument(
        "--locked-dropout",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="all of the above with one mask for all steps of a window, not one per element (variational "
        "dropout, Gal & Ghahramani 2016, arXiv:1512.05287)",
    )
    parser.add_argument(
        "--dropout-words",
        type=flags.fraction,
        default=0.0,
        metavar="P",
        help="probability of dropping a word of the vocabulary from the input for a whole window (the same "
        "paper); the softmax keeps it",
    )
    parser.add_argument(
        "--dropout-weights",
        type=flags.fraction,
        default=0.0,
        metavar="P",
        help=f"weight drop, one mask per window, on {recurrent_matrices} (Merity et al. 2018, "
        "arXiv:1708.02182)",
    )
    parser.add_argument(
        "--dropout-candidate",
        type=flags.fraction,
        default=0.0,
        metavar="P",
        help=f"recurrent dropout of {candidate}, where Semeniuta et al. 2016 (arXiv:1603.05118) put it, with "
        "one mask per window",
    )


# What both models' recommended recipe for WikiText-2 has in common: a few epochs of many small steps, little
# dropout, and an average of the weights in place of a lower learning rate. Sizes and learning rates are those
# of the best runs in results/wikitext2_cpu (seven epochs of the RMC, three of the LSTM, with --bf16).
WIKITEXT2 = {
    "dropout": 0.3,
    "batch_size": 32,
    "bptt": 35,
    "clip": 0.25,
    "average": "ema",
    "average_decay": 0.999,
    "epochs": 7,
}

# And the one for long runs: all parts of the AWD-LSTM, with Adam, a cosine and a moving average in place of
# SGD and NT-ASGD, and with less dropout of input and weights, as the models are a third of its size. A
# starting point, chosen by hand: not measured yet.
WIKITEXT2_REGULARISED = {
    "tied": True,
    "locked_dropout": True,
    "dropout_input": 0.4,
    "dropout_output": 0.4,
    "dropout_words": 0.1,
    "dropout_weights": 0.4,
    "tar": 1.0,
    "weight_decay": 0.03,
    "lr": 0.002,
    "schedule": "cosine",
    "warmup": 500,
    "clip": 0.25,
    "batch_size": 40,
    "bptt": 70,
    "epochs": 100,
    "average": "ema",
    "average_decay": 0.9995,
}


def apply_recipe(parser: argparse.ArgumentParser, argv: Sequence[str] | None, recipes: Recipes) -> None:
    """Makes the values of the recipe asked for the parser's defaults, and says which flags that are.

    What is printed is in force: where the command line gives a flag itself, its value and what it replaces.
    With --resume it is not asked: the run's args.json has all flags, those of its recipe too.

    Raises:
        UserError: the command line asks for no training.
    """
    given = flags.given_arguments(parser, argv)
    name = given.get("recipe")
    if name is None or given.get("resume") is not None:
        return
    if given.get("evaluate") is not None:
        raise UserError("--recipe sets flags of training; --evaluate trains nothing. Leave --recipe away.")
    recipe = recipes[name]
    parser.set_defaults(**recipe)
    in_force = {flag: given.get(flag, value) for flag, value in recipe.items()}

    def typed(values: Mapping[str, Any]) -> str:
        return shlex.join(as_typed(parser, values))

    print(f"recipe {name}: {typed(in_force)}")
    replaced = [
        f"{typed({flag: in_force[flag]})} in place of {typed({flag: value})}"
        for flag, value in recipe.items()
        if in_force[flag] != value
    ]
    if replaced:
        print(f"given beside it: {', '.join(replaced)}")


def as_typed(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that gives these values, by their names in the namespace."""
    words = []
    for name, value in values.items():
        flag = flags.flag_of(parser, name)
        if value is True:
            words.append(flag)
        elif value is False:  # said where there is a word for it, else by leaving the flag away
            no = f"--no-{flag.removeprefix('--')}"
            words += [no] if no in parser._option_string_actions else []
        else:
            words += [flag, str(value)]
    return words


def dropouts(args: argparse.Namespace) -> dict[str, Any]:
    """What the dropout flags mean as arguments of the models."""
    given = {
        name: getattr(args, name)
        for name in ("dropout_input", "dropout_hidden", "dropout_output")
        if hasattr(args, name)
    }
    return {
        **{name: args.dropout if value is None else value for name, value in given.items()},
        "locked_dropout": args.locked_dropout,
        "dropout_words": args.dropout_words,
        "dropout_weights": args.dropout_weights,
        "dropout_candidate": args.dropout_candidate,
    }


def choose_softmax(args: argparse.Namespace, vocab_size: int) -> list[int] | None:
    """The cutoffs of the adaptive softmax, None for the full softmax. Prints those it chooses itself."""
    if not args.adaptivesoftmax:
        if args.cutoffs:
            raise UserError(
                "--cutoffs was given without --adaptivesoftmax, where it means nothing. "
                "Add --adaptivesoftmax or leave --cutoffs away."
            )
        return None
    if args.cutoffs is None:
        cutoffs = choose_cutoffs(vocab_size)
        print(f"adaptive softmax: cutoffs {' '.join(map(str, cutoffs))}, chosen for {vocab_size:,} words")
        return cutoffs
    if sorted(set(args.cutoffs)) != args.cutoffs or args.cutoffs[-1] >= vocab_size:
        fitting = choose_cutoffs(vocab_size)
        raise UserError(
            f"cutoffs must be increasing and below the vocabulary size {vocab_size:,}, got {args.cutoffs}."
            + (f" Try --cutoffs {' '.join(map(str, fitting))}." if fitting else "")
        )
    return args.cutoffs
