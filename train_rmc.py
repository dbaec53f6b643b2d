"""Train a word-level language model on the relational memory core of Santoro et al. 2018 (arXiv:1806.01822).

Examples: python train_rmc.py --recipe tiny
          python train_rmc.py --cuda

Every run writes a folder under runs/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from training import distributed, flags
from training.script import run

from relational_rnn_models import CORE_DEFAULTS, RelationalMemoryLM
from tasks import language_flags, language_modeling
from tasks.core_flags import add_core_flags, core_arguments

# fmt: off
RECIPES = {
    # About two minutes on a CPU.
    "tiny": {
        **language_flags.TINY,
        "emsize": 128, "headsize": 32, "keysize": 32, "attmlplayers": 2, "forgetbias": 2.0, "lr": 0.0015,
    },
    # 10,753,158 parameters.
    "wikitext2": {**language_flags.WIKITEXT2, "emsize": 184, "headsize": 176, "lr": 0.002},
}
# fmt: on


def build_parser() -> flags.Parser:
    """Return the script's command line."""
    parser = flags.Parser("train_rmc", __doc__)
    core = parser.add_argument_group("relational memory core")
    flags.option(core, "--emsize", flags.positive_int, 192, "UNITS", "embedding size")
    add_core_flags(core, CORE_DEFAULTS)
    language_flags.add_dropout_flags(
        core, "the memory's gates and the queries, keys and values", "what is written into the memory"
    )
    language_flags.add_flags(parser, list(RECIPES))
    return parser


def build_model(args: argparse.Namespace, vocab_size: int, cutoffs: list[int] | None) -> RelationalMemoryLM:
    """Return the model that the arguments describe, with random weights."""
    dropouts = language_flags.dropouts(args)
    return RelationalMemoryLM(vocab_size, args.emsize, cutoffs=cutoffs, **dropouts, **core_arguments(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    script = language_modeling.script("train_rmc", "rmc", build_parser(), build_model, RECIPES)
    return run(script, argv)


if __name__ == "__main__":
    distributed.run_script(main, language_modeling.LOWER_MEMORY)
