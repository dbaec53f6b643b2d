"""Draw the curves of finished runs and of runs in progress into a PNG.

Language models: validation perplexity, of the averaged weights once they are better. Other tasks: test
accuracy. Nth farthest has lines for chance (1/K), for the plateau (2/K: a model that has learned only that
the nearest vector is the reference itself) and, at the paper's size, for the paper's RMC (91 %).
Runs that differ only in their seed have the same color.

Paths are run folders, folders with runs, study files (STUDY.jsonl, made by tools/pack_runs.py), or STUDY/NAME
for one run of a study file.

Examples: python tools/plot_runs.py runs --outf curves.png
          python tools/plot_runs.py "results/nth_farthest/small/runs/rmc-seed*" --against wall
          python tools/plot_runs.py runs/rmc runs/wide --training --labels "RMC" "RMC, 8 heads"
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _project  # noqa: F401
from training import console, files, flags
from training.console import UserError

import run_files
from run_files import Run

PAPER_ACCURACY = 0.91  # 8 vectors of 16 dimensions: arXiv:1806.01822, section 5.1
# Name of a horizontal axis: the axis label, and the field of an event with the factor that gives its value.
AXES = {
    "epochs": ("epochs", "epoch", 1.0),
    "steps": ("training steps", "step", 1.0),
    "wall": ("training time (minutes)", "seconds", 1 / 60),
}


def name_groups(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return a legend for each group of runs: the model if no other group has it, otherwise the first run."""
    models = [members[0].model for members in groups]
    labels = []
    for members, model in zip(groups, models, strict=True):
        seeds = len({run.arguments.get("seed") for run in members})
        name = model if models.count(model) == 1 else members[0].name
        labels.append(f"{name}, {seeds} seeds" if seeds > 1 else name)
    return labels


def points(run: Run, against: str, training: bool = False) -> tuple[list[float], list[float]]:
    """Return the points of a curve, without events that lack one of the two numbers.

    Args:
        against: a key of AXES.
        training: the training perplexity or accuracy instead of that in validation or test.
    """
    _, x, factor = AXES[against]
    event, fields, scale = "valid", ["train_ppl"] if training else ["ppl", "average_ppl"], 1
    if run.kind != "language model":
        event, fields, scale = "train", ["accuracy"] if training else ["test_accuracy"], 100  # percent
    found = []
    for entry in run.events:
        values = [scale * entry[field] for field in fields if entry.get(field) is not None]
        if entry.get("event") == event and values and entry.get(x) is not None:
            found.append((factor * entry[x], min(values)))
    return [place for place, _ in found], [value for _, value in found]


def reference_lines(found: Sequence[Run]) -> list[tuple[float, str]]:
    """Return accuracies to compare with, in percent, and their names."""
    lines = {100 * run.record["chance"]: "constant answer" for run in found if "chance" in run.record}
    sizes = {(r.arguments["num_vectors"], r.arguments["num_dims"]) for r in found if r.kind == "nth_farthest"}
    for K, _ in sizes:
        # On the plateau m itself is known, the answer for n = K - 1; for the other n, one of the remaining
        # K - 1 labels is guessed: 1/K + (K - 1)/K * 1/(K - 1).
        lines |= {100 / K: "chance", 200 / K: "plateau"}
    if (8, 16) in sizes:
        lines[100 * PAPER_ACCURACY] = "RMC of the paper"
    return [(value, f"{name} {value:.3g} %") for value, name in sorted(lines.items())]


def draw(
    groups: Sequence[Sequence[Run]], labels: Sequence[str], against: Sequence[str], training: bool = False
) -> Any:
    """Return a matplotlib figure with a panel for each of the given axes."""
    # A notebook sets it to a backend that this Python may not have; then even the import fails.
    os.environ["MPLBACKEND"] = "agg"
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
    except ImportError as error:
        raise UserError(
            f"plots require matplotlib, which cannot be imported ({error}). "
            "Install it with: pip install -r requirements-extra.txt"
        ) from None
    found = [run for members in groups for run in members]
    figure = Figure(figsize=(5 * len(against), 3.4), layout="constrained")
    panels = figure.subplots(1, len(against), sharey=True, squeeze=False)[0]
    for axis, name in zip(panels, against, strict=True):
        lines = []
        for number, members in enumerate(groups):
            for run in members:
                marker = {"marker": ".", "markersize": 5} if run.kind == "language model" else {}
                curves = axis.plot(*points(run, name), color=f"C{number}", linewidth=1.4, **marker)
                if training:
                    axis.plot(*points(run, name, True), color=f"C{number}", linewidth=1, linestyle="--")
            lines += curves
        axis.set_xlabel(AXES[name][0])
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=name != "wall"))
        axis.grid(axis="y", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    first = panels[0]
    if found[0].kind != "language model":
        first.set(ylim=(0, 102), ylabel="accuracy (%)")
        for axis in panels:
            for value, text in reference_lines(found):
                axis.axhline(value, color="gray", linestyle=":", linewidth=1)
                above = value > 90  # where no curve is likely to be
                axis.annotate(
                    text, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 1 if above else -3),
                    textcoords="offset points", color="dimgray", ha="right", fontsize=8,
                    va="bottom" if above else "top",
                )  # fmt: skip
    else:
        first.set(yscale="log", ylabel="perplexity" if training else "validation perplexity")
        bottom, top = first.get_ylim()
        wide = top > 4 * bottom
        ticks = LogLocator(subs=(1, 1.5, 2, 3, 5, 7)) if wide else MaxNLocator(6, steps=[1, 2, 5, 10])
        first.yaxis.set_major_locator(ticks)
        first.yaxis.set_minor_locator(NullLocator())
        first.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    if training:
        lines += first.plot([], [], color="gray", linewidth=1, linestyle="--")
        labels = [*labels, "training"]
    # Set afterward, and without mathematics: matplotlib leaves out a label that starts with an underscore.
    legend = first.legend(lines, ["label"] * len(lines), fontsize=9, frameon=False)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)
    return figure


def draw_runs(
    paths: Sequence[Path],
    path: Path,
    against: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    training: bool = False,
) -> int:
    """Draw the curves of runs into a PNG and return the number of runs.

    Args:
        paths: as run_files.read_runs takes them; all language models, or all of one other script.
        path: the PNG to write.
        against: keys of AXES; None for epochs of language models, otherwise steps.
        labels: legends of the groups of runs that differ only in their seed; groups with the same legend are
            drawn as one. None for name_groups.
        training: also draw training perplexity or accuracy.

    Raises:
        UserError: runs or labels do not fit together, or matplotlib is missing.
    """
    found = run_files.read_runs(paths)
    words = found[0].kind == "language model"
    if len({run.kind for run in found}) > 1:
        raise UserError(
            f"{' and '.join(sorted({run.kind for run in found}))} runs cannot share a plot. Give the runs of "
            "one kind, for example with runs/train_rmc-* instead of runs."
        )
    if not words and "epochs" in (against or ()):
        raise UserError(f"{found[0].kind} runs have no epochs. Use --against steps wall.")
    groups = run_files.group(found)
    if labels is not None and len(labels) != len(groups):
        names = "; ".join(", ".join(run.name for run in members) for members in groups)
        raise UserError(f"--labels requires {len(groups)} texts, got {len(labels)}. The groups are: {names}.")
    against = against or ["epochs" if words else "steps"]
    merged: dict[str, list[Run]] = {}
    for label, members in zip(labels or name_groups(groups), groups, strict=True):
        merged.setdefault(label, []).extend(members)
    figure = draw(list(merged.values()), list(merged), against, training)
    files.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=150))
    return len(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="RUN", help="a path as above")
    add("--outf", type=Path, default=Path("runs.png"), metavar="PNG", help="file to write")
    add("--against", nargs="+", choices=list(AXES),
        help="horizontal axes, one panel for each (default: epochs, or else steps)")  # fmt: skip
    add("--labels", nargs="+", metavar="TEXT",
        help="labels of the legend, one for each group of runs that differ only in their seed")  # fmt: skip
    add("--training", action="store_true", help="also draw training perplexity or accuracy, dashed")
    args = parser.parse_args(argv)
    count = draw_runs(args.paths, args.outf, args.against, args.labels, args.training)
    console.say(f"curves of {count} run{'s' if count > 1 else ''}: {args.outf}")


if __name__ == "__main__":
    console.run_script(main)
