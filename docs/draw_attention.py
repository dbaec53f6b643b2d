"""Draw attention and gates of a trained RMC language model into attention.png, beside this file.

Example: python train_rmc.py --recipe tiny --epochs 2 --threads 1 --name attention
         python docs/draw_attention.py runs/attention

The model must have one memory slot and the words of data/tiny. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
matplotlib.use("Agg")
from training import checkpoints  # noqa: E402

from matplotlib import pyplot as plt  # noqa: E402

from tasks import language_modelling  # noqa: E402

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
    args = parser.parse_args(argv)
    checkpoint = checkpoints.load_checkpoint(language_modelling.find_checkpoint(args.run))
    model, vocabulary = language_modelling.load_model(checkpoint, torch.device("cpu"))
    words = STORY.split()
    rows = rows_of(model, vocabulary.encode(words))
    figure, axes = plt.subplots(figsize=(11, 2.7), layout="constrained")
    image = axes.imshow(torch.stack(list(rows.values())), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
    axes.tick_params(length=0)
    for place, word in enumerate(words[:-1]):
        if word == "<eos>":
            axes.axvline(place + 0.5, color="white", linewidth=2)
    axes.axhline(len(rows) - 2.5, color="white", linewidth=2)
    figure.colorbar(image, ax=axes, pad=0.01)
    figure.savefig(FOLDER / "attention.png", dpi=110)


if __name__ == "__main__":
    main()
