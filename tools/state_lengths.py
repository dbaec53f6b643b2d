"""Measure how a language model's perplexity depends on how many words its state has seen (figure 12 of the
paper, Santoro et al. 2018).

With resets every L words, the targets of a text are cut into segments of L (the last one may be shorter), and
each segment is read from the initial state. Target k of a segment is predicted from k words, those since the
reset. Every target of the text is scored once for each L. Two losses are measured:

    loss           mean over all targets, with resets every L words: the state covers at most L words
    loss_between   with resets every L_max words, the largest given length: mean over the targets that have
                   more than L' and at most L words since the reset, where L' is the next smaller length

The table and the CSV file also hold the loss with the state carried through the whole split ("never").

Example: python tools/state_lengths.py runs/my-run --lengths 10 100 1000
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _project  # noqa: F401
from training import checkpoints, console, devices, files, flags

import torch

from data_utils import IGNORED
from layers.language_model import LanguageModel, perplexity
from tasks.language_modelling import evaluate, find_checkpoint, load_model, load_text

WINDOW = 100  # words of a segment that are read at once
TOKENS_AT_ONCE = 6400  # of all segments that are read side by side
SPLITS = ("valid", "test")


@dataclass(frozen=True)
class StateLength:
    """Losses in nats per token for states of at most `words` words, as explained at the top of this file.

    loss_between is nan, and targets_between 0, where the text is shorter than the bin.
    """

    words: int
    loss: float
    targets: int
    loss_between: float
    targets_between: int


@torch.no_grad()
def losses_since_reset(
    model: LanguageModel, ids: torch.Tensor, length: int, edges: Sequence[int], device: torch.device | str
) -> tuple[list[float], list[int]]:
    """Return the summed nats and the number of targets of each bin, with resets every `length` words.

    Args:
        model: in eval mode.
        ids: the text, (N,).
        edges: increasing numbers of words, the last one `length`. Bin i holds the targets with more than
            edges[i - 1] (0 for the first bin) and at most edges[i] words since the reset.
    """
    ids, pairs = ids.to(device), len(ids) - 1
    starts = torch.arange(0, pairs, length, device=device)
    at_once = max(1, TOKENS_AT_ONCE // min(length, WINDOW))
    nats = torch.zeros(len(edges), dtype=torch.float64, device=device)
    counts = [0] * len(edges)
    for group in range(0, len(starts), at_once):
        begin = starts[group : group + at_once]
        lengths = [min(length, pairs - (group + row) * length) for row in range(len(begin))]
        state = model.initial_state(len(begin))
        for index, (low, high) in enumerate(zip([0, *edges], edges, strict=False)):
            high = min(high, max(lengths))
            for first in range(low, high, WINDOW):
                places = begin[:, None] + torch.arange(first, min(first + WINDOW, high), device=device)
                inside = places < pairs  # the last segment of the text may be shorter
                places = places.clamp(max=pairs - 1)
                targets = torch.where(inside, ids[places + 1].long(), IGNORED)
                window_nats, state = model(ids[places].long(), targets, state)
                nats[index] += window_nats.sum()
            counts[index] += sum(max(0, min(high, count) - low) for count in lengths)
    return nats.tolist(), counts


def state_lengths(
    model: LanguageModel, ids: torch.Tensor, lengths: Sequence[int], device: torch.device | str
) -> list[StateLength]:
    """Measure the losses of a text, (N,), for each length, in increasing order. The model is in eval mode."""
    lengths = sorted(set(lengths))
    since, counts = losses_since_reset(model, ids, lengths[-1], lengths, device)
    rows = []
    for words, between, between_count in zip(lengths, since, counts, strict=True):
        if words == lengths[-1]:
            total, count = sum(since), sum(counts)
        else:
            (total,), (count,) = losses_since_reset(model, ids, words, [words], device)
        share = between / between_count if between_count else math.nan
        rows.append(StateLength(words, total / count, count, share, between_count))
    return rows


def table(rows: Sequence[StateLength], carried: float, columns: int) -> str:
    """Return the rows as text, and below them the perplexity with the state carried through the split.

    Left: perplexity with the state reset every so many words. Right: perplexity by the words since a reset,
    with resets at the largest length. Each with its number of targets.
    """
    numbers, longest = f"  {'ppl':>9}  {'targets':>9}", f"every {rows[-1].words:,}"
    lines = [
        f"{'state reset':>12}{'':22}  |  {'words since a reset':>19}",
        f"{'every':>12}{numbers}  |  {longest:>19}{numbers}",
    ]
    for low, row in zip([0, *(row.words for row in rows)], rows, strict=False):
        since = f"{row.words:,}" if row.words == low + 1 else f"{low + 1:,}-{row.words:,}"
        between = f"{perplexity(row.loss_between):.2f}" if row.targets_between else "-"
        lines.append(
            f"{row.words:>12,}  {perplexity(row.loss):>9.2f}  {row.targets:>9,}  |  "
            f"{since:>19}  {between:>9}  {row.targets_between:>9,}"
        )
    return "\n".join([*lines, f"{'never':>12}  {perplexity(carried):>9.2f}  ({columns} columns)"])


def write_csv(path: Path, splits: dict[str, tuple[Sequence[StateLength], float]], columns: int) -> None:
    """Write the rows of all splits. The row of the carried state has columns in place of words."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["split", "words", "columns", "loss", "targets", "loss_between", "targets_between"])
    for split, (rows, carried) in splits.items():
        for row in rows:
            between = repr(row.loss_between) if row.targets_between else ""
            writer.writerow([split, row.words, "", repr(row.loss), row.targets, between, row.targets_between])
        writer.writerow([split, "", columns, repr(carried), "", "", ""])
    files.atomic_write(path, lambda file: file.write(text.getvalue().encode("utf-8")))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a trained model, print the tables and write state_lengths.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    add = parser.add_argument
    add("model", metavar="RUN_OR_CHECKPOINT", help="run folder with a best.pt, or a checkpoint")
    add("--lengths", nargs="+", type=flags.positive_int, default=[1, 10, 100, 1000], metavar="WORDS",
        help="reset the state after this many words")  # fmt: skip
    add("--data", metavar="FOLDER", help="corpus folder (default: the corpus that the model was trained on)")
    add("--eval-batch-size", "--eval_batch_size", type=flags.positive_int, default=1, metavar="N",
        help="columns of the evaluation without resets; 1 reads a split as one stream")  # fmt: skip
    add(
        "--outf", type=Path, metavar="CSV", help="file to write (default: state_lengths.csv beside the model)"
    )
    add("--cuda", action="store_true", help="use the GPU")
    add("--threads", type=flags.thread_count, default=0, metavar="N",
        help="CPU threads; 0 = torch's choice")  # fmt: skip
    args = parser.parse_args(argv)
    path = find_checkpoint(args.model)
    outf = args.outf or path.parent / "state_lengths.csv"
    files.check_writable(outf)
    device = devices.choose_device(args.cuda)
    if args.threads:
        torch.set_num_threads(args.threads)
    checkpoint = checkpoints.load_checkpoint(path)
    model, vocabulary = load_model(checkpoint, device)
    corpus = load_text(path, checkpoint, vocabulary, args.data)
    found = {}
    for split in SPLITS:
        ids = getattr(corpus, split)
        carried = evaluate(model, ids, args.eval_batch_size, WINDOW, device, label=split)
        rows = state_lengths(model, ids, args.lengths, device)
        console.say(f"{split}:\n{table(rows, carried, args.eval_batch_size)}")
        found[split] = (rows, carried)
    write_csv(outf, found, args.eval_batch_size)
    console.say(f"written: {outf}")


if __name__ == "__main__":
    console.run_script(main, lower="--lengths")
