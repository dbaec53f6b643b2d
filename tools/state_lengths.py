"""How a language model's perplexity depends on how much state it carries, after the paper's figure 12.

With resets every L words, the targets of a text are cut into segments of L in a row, the last one shorter,
and each segment is read from the initial state. Target number k of a segment is then predicted from exactly k
words, those since the reset: k = 1 is the first, predicted from one word. Every target of the text is scored
once for each L. Two numbers come of it:

    loss           with resets every L words, the mean over all targets: what a state of at most L words is
                   worth
    loss_between   with resets every L_max words, the longest of the lengths asked for, the mean over those
                   targets that come more than L' and at most L words after a reset, L' being the next shorter
                   length: how perplexity falls with the words since a reset, all on the same segments

Segments are independent of each other, so that many are read side by side, and for each L no more than the
text itself has to be read.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_utils import IGNORED
from layers.language_model import LanguageModel, perplexity
from training import files

WINDOW = 100  # places of a segment read at once
TOKENS_AT_ONCE = 6400  # of all segments together


@dataclass(frozen=True)
class StateLength:
    """What a state of so many words is worth; losses in nats per token.

    words: L. loss, targets: with resets every L words, and how many targets that are. loss_between,
    targets_between: as the module says; nan and 0 where the text is shorter.
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
    """Summed nats and numbers of the targets between edges, with resets every `length` words.

    Args:
        model: in eval mode.
        ids: the text, (N,).
        edges: increasing numbers of words since the reset, the last of them `length`: bin i holds the targets
            with more than edges[i - 1] (0 for the first) and at most edges[i].
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
                inside = places < pairs  # the text's last segment ends early
                places = places.clamp(max=pairs - 1)
                targets = torch.where(inside, ids[places + 1].long(), IGNORED)
                window_nats, state = model(ids[places].long(), targets, state)
                nats[index] += window_nats.sum()
            counts[index] += sum(max(0, min(high, count) - low) for count in lengths)
    return nats.tolist(), counts


def state_lengths(
    model: LanguageModel, ids: torch.Tensor, lengths: Sequence[int], device: torch.device | str
) -> list[StateLength]:
    """The numbers of the module's docstring, one row per length, in increasing order."""
    lengths = sorted(set(lengths))
    was_training = model.training
    model.eval()
    try:
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
    finally:
        model.train(was_training)


def table(rows: Sequence[StateLength], carried: float, columns: int) -> str:
    """The rows as text, and below them the loss with the state carried through the whole split.

    On the left perplexity with the state reset every so many words; on the right, by the words since a reset,
    with resets at the longest of the lengths; each with the number of targets that it is the mean of.
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
    """Writes the rows of all splits; the carried state's row has no number of words, but one of columns."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["split", "words", "columns", "loss", "targets", "loss_between", "targets_between"])
    for split, (rows, carried) in splits.items():
        for row in rows:
            between = repr(row.loss_between) if row.targets_between else ""
            writer.writerow([split, row.words, "", repr(row.loss), row.targets, between, row.targets_between])
        writer.writerow([split, "", columns, repr(carried), "", "", ""])
    files.atomic_write(path, lambda file: file.write(text.getvalue().encode("utf-8")))
