"""Train a word-level LSTM, GRU or plain recurrent language model: the baseline of train_rmc.py.

Examples: python train_rnn.py --recipe tiny
          python train_rnn.py --cuda --tied --cudnn

Every run writes a folder under runs/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from training import distributed, flags
from training.flags import option, switch
from training.script import run

from rnn_models import LAYERS, RNNLM
from tasks import language_flags, language_modeling

# fmt: off
RECIPES = {
    # About as many weights, and as many epochs, as train_rmc.py's recipe of this name.
    "tiny": {
        **language_flags.TINY,
        "emsize": 150, "nhid": 150, "tied": True, "cudnn": True, "lr": 0.005,
    },
    # 10,733,894 parameters, with the same split between embedding and recurrent part as in train_rmc.py.
    "wikitext2": {
        **language_flags.WIKITEXT2,
        "emsize": 184, "nhid": 960, "project": True, "tied": True, "cudnn": True, "lr": 0.004,
    },
}
# fmt: on


def build_parser() -> flags.Parser:
    """Return the script's command line."""
    parser = flags.Parser("train_rnn", __doc__)
    network = parser.add_argument_group("recurrent network")
    # fmt: off
    option(network, "--model", None, "LSTM", None, "kind of cell", choices=tuple(LAYERS))
    option(network, "--emsize", flags.positive_int, 300, "UNITS", "embedding size")
    option(network, "--nhid", flags.positive_int, 300, "UNITS", "hidden units per layer")
    option(network, "--nlayers", flags.layer_count, 1, "N", "recurrent layers")
    switch(network, "--tied",
           "share one matrix between embedding and softmax; requires --emsize equal to --nhid, or --project")
    network.add_argument(
        "--cudnn", action=argparse.BooleanOptionalAction, default=False,
        help="use torch's fused layer (cuDNN on a GPU), not a loop of cells; the result is the same")
    switch(network, "--project",
           "add a linear layer from the hidden units to --emsize before the softmax, as in the RMC language "
           "model; --tied then works with any --nhid")
    language_flags.add_dropout_flags(
        network, "weight_hh of every layer",
        "what is added to the LSTM's cells (loop of cells only, without --cudnn)", between_layers=True)
    # fmt: on
    language_flags.add_flags(parser, list(RECIPES))
    return parser


def build_model(args: argparse.Namespace, vocab_size: int, cutoffs: list[int] | None) -> RNNLM:
    """Return the model that the arguments describe, with random weights.

    Raises:
        ValueError: flags that contradict each other.
    """
    if args.tied and cutoffs is not None:
        raise ValueError(
            "--tied and --adaptivesoftmax cannot be combined: the clusters of adaptive softmax have other "
            "weights. Omit one of them."
        )
    return RNNLM(
        vocab_size, args.model, args.emsize, args.nhid, args.nlayers, cutoffs=cutoffs, tied=args.tied,
        fused=args.cudnn, project=args.project, **language_flags.dropouts(args)
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    script = language_modeling.script("train_rnn", "rnn", build_parser(), build_model, RECIPES)
    return run(script, argv)


if __name__ == "__main__":
    distributed.run_script(main, language_modeling.LOWER_MEMORY)
