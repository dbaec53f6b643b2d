"""Draw attention and gates of a trained RMC language model.

Example: python train_rmc.py --recipe tiny --epochs 2 --threads 1 --name attention
         python docs/draw_attention.py runs/attention --outf attention.png

The model must have one memory slot and the words of data/tiny. Requires matplotlib.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["MPLBACKEND"] = "agg"  # not that of a notebook, which this Python may not have
from training import checkpoints, console  # noqa: E402

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from tasks import language_modeling  # noqa: E402

STORY = """
    one bright noon near the river tom met lucy . <eos>
    lucy had a golden kite and tom had a tired owl . <eos>
    lucy was stronger than tom . <eos>
    then lucy gave the kite to tom . <eos>
    who had the kite ? it was tom . <eos>
"""


@torch.no_grad()
def rows_of(model: torch.nn.Module, ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the rows of the picture, each (T,), by label."""
    details = model.core.inspect(model.embedding(torch.tensor([ids])))
    to_input = details.attention[0][0, :, :, 0, 1]  # (T, H): from the memory row to the input row
    rows = {f"attention to the word, head {head}": row for head, row in enumerate(to_input.t(), 1)}
    rows["input gate, mean"] = details.input_gate[0].mean(dim=(1, 2))
    rows["forget gate, mean"] = details.forget_gate[0].mean(dim=(1, 2))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="RUN", help="run folder of train_rmc.py, or a checkpoint")
    parser.add_argument("--outf", default="attention.png", metavar="PNG", help="file to write")
    args = parser.parse_args(argv)
    checkpoint = checkpoints.load_checkpoint(language_modeling.find_checkpoint(args.run))
    model, vocabulary = language_modeling.load_model(checkpoint, torch.device("cpu"))
    words = STORY.split()
    rows = rows_of(model, vocabulary.encode(words))
    figure = Figure(figsize=(11, 2.7), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(torch.stack(list(rows.values())), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
    axes.tick_params(length=0)
    for place, word in enumerate(words[:-1]):
        if word == "<eos>":
            axes.axvline(place + 0.5, color="white", linewidth=2)
    axes.axhline(len(rows) - 2.5, color="white", linewidth=2)
    figure.colorbar(image, ax=axes, pad=0.01)
    figure.savefig(args.outf, format="png", dpi=110)
    print(f"attention and gates: {args.outf}")


if __name__ == "__main__":
    console.run_script(main)
