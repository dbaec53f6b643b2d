"""Train a word-level LSTM, GRU or plain recurrent language model: the baseline of train_rmc.py.

Examples: python train_rnn.py --recipe tiny
          python train_rnn.py --cuda --tied --cudnn

Every run writes a folder under runs/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rnn_models import RNNLM
from training import distributed, flags, lm_flags, lm_training

SCRIPT = "train_rnn"

RECIPES = {
    # As many weights and epochs as train_rmc.py's recipe of this name.
    "tiny": {
        "data": "tiny",
        "emsize": 150,
        "nhid": 150,
        "tied": True,
        "cudnn": True,
        "dropout": 0.1,
        "lr": 0.005,
        "schedule": "cosine",
        "clip": 1.0,
        "batch_size": 32,
        "bptt": 32,
        "epochs": 11,
        "threads": 1,
        "eval_batch_size": 4,
    },
    # 10,733,894 parameters, parted between embedding and recurrence as train_rmc.py's recipe parts them.
    "wikitext2": {
        "emsize": 184,
        "nhid": 960,
        "project": True,
        "tied": True,
        "cudnn": True,
        "lr": 0.004,
        **lm_flags.WIKITEXT2,
    },
    # 10,609,998 parameters.
    "wikitext2-regularised": {
        "emsize": 280,
        "nhid": 280,
        "nlayers": 2,
        "cudnn": True,
        "dropout_hidden": 0.25,
        "ar": 2.0,
        **lm_flags.WIKITEXT2_REGULARISED,
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = argparse.ArgumentParser(
        prog=f"{SCRIPT}.py", description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False
    )
    network = parser.add_argument_group("recurrent network")
    network.add_argument(
        "--model", choices=("LSTM", "GRU", "RNN_TANH", "RNN_RELU"), default="LSTM", help="kind of cell"
    )
    network.add_argument(
        "--emsize", type=flags.positive_int, default=300, metavar="UNITS", help="size of a word's embedding"
    )
    network.add_argument(
        "--nhid", type=flags.positive_int, default=300, metavar="UNITS", help="hidden units per layer"
    )
    network.add_argument("--nlayers", type=flags.layer_count, default=1, metavar="N", help="recurrent layers")
    network.add_argument(
        "--tied",
        action="store_true",
        help="one matrix for embedding and softmax; needs --emsize equal to --nhid, or --project",
    )
    network.add_argument(
        "--cudnn",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch's fused layer (cuDNN on a GPU) in place of a loop of cells; the same maths",
    )
    network.add_argument(
        "--project",
        action="store_true",
        help="a linear layer from the hidden units to --emsize before the softmax, as the relational memory "
        "core has one; --tied then works with any --nhid",
    )
    lm_flags.add_dropout_flags(
        network,
        "weight_hh of every layer",
        "what is added to the LSTM's cells (the loop of cells alone, without --cudnn)",
        between_layers=True,
    )
    lm_flags.add_flags(parser, RECIPES)
    return parser


def build_model(args: argparse.Namespace, vocab_size: int, cutoffs: list[int] | None) -> RNNLM:
    """The model that the arguments describe, with random weights; ValueError where they are wrong."""
    if args.tied and cutoffs is not None:
        raise ValueError(
            "--tied and --adaptivesoftmax exclude each other: the clusters of adaptive softmax have weights "
            "of their own. Leave one of them away."
        )
    if args.dropout_candidate and (args.model != "LSTM" or args.cudnn):
        raise ValueError(
            "--dropout-candidate acts inside an LSTM's cells, which only the loop of cells can do (this: "
            f"{args.model}{' with --cudnn' if args.cudnn else ''}). Give --model LSTM and --no-cudnn, or "
            "use --dropout-weights, which works with all."
        )
    if args.tied and not args.project and args.emsize != args.nhid:
        raise ValueError(
            "--tied has embedding and softmax share one matrix, so --nhid must equal --emsize, got "
            f"{args.nhid} and {args.emsize}. Make them equal, or give --project."
        )
    return RNNLM(
        vocab_size,
        model=args.model,
        embedding_size=args.emsize,
        hidden_size=args.nhid,
        num_layers=args.nlayers,
        cutoffs=cutoffs,
        tied=args.tied,
        fused=args.cudnn,
        project=args.project,
        **lm_flags.dropouts(args),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    return lm_training.run(build_parser(), argv, SCRIPT, "rnn", build_model, RECIPES)


if __name__ == "__main__":
    distributed.run_script(main, lm_training.LOWER_MEMORY)
