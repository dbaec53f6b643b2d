"""Draw the curves of finished runs and of runs in progress into a PNG.

Language models: perplexity in validation and training. Nth farthest: test accuracy and training loss, with
lines for chance (1/K), for a model that only knows that the nearest vector is the reference itself (2/K) and,
for the paper's task, for its RMC (91 %). Runs that differ only in their seed have the same colour.

Paths are run folders, folders with runs, study files (STUDY.jsonl, made by tools/pack_runs.py), or STUDY/NAME
for one run of a study file.

Examples: python tools/plot_runs.py runs --outf curves.png
          python tools/plot_runs.py "results/nth_farthest/small/runs/rmc-seed*"
          python tools/plot_runs.py results/wikitext2_cpu --against tokens wall
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
    "steps": ("steps", "step", 1.0),
    "tokens": ("million training tokens", "epoch", None),
    "wall": ("wall time (minutes)", "seconds", 1 / 60),
}


def import_pyplot() -> Any:
    """Return matplotlib.pyplot, set to draw into files; UserError if it cannot be imported."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # training machines often have no screen
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError(
            f"plots need matplotlib, which cannot be imported ({error}). "
            "Install it with: pip install -r requirements-extra.txt"
        ) from None
    return plt


def name_lines(found: Sequence[Run]) -> dict[int, tuple[str, str]]:
    """Return the colour and the legend of each run, by its place in `found`.

    Runs that differ only in their seed share a colour, and the first has the legend of all. The legend is the
    model's name where that is unique, otherwise the run's name.
    """
    groups: dict[str, list[int]] = {}
    for place, run in enumerate(found):
        groups.setdefault(run.settings({}), []).append(place)
    models = [found[places[0]].model for places in groups.values()]
    lines = {}
    for number, places in enumerate(groups.values()):
        first = found[places[0]]
        label = first.model if models.count(first.model) == 1 else first.name
        if len(places) > 1:
            label += f" ({len(places)} seeds)"
        lines |= {place: (f"C{number}", label if place == places[0] else "_") for place in places}
    return lines


def points(run: Run, event: str, against: str, field: str) -> tuple[list[float], list[float]]:
    """Return the points of a curve, without events that lack one of the two numbers.

    Args:
        against: a key of AXES.
        field: name of the vertical value.
    """
    _, x, factor = AXES[against]
    if factor is None:
        factor = run.record.get("corpus", {}).get("train", 0) / 1e6
    found = [e for e in run.events if e.get("event") == event and None not in (e.get(x), e.get(field))]
    return [factor * e[x] for e in found], [e[field] for e in found]


def draw_language_models(plt: Any, found: Sequence[Run], against: Sequence[str]) -> Any:
    """Draw perplexity against each of the given axes: validation, averaged weights and training."""
    figure, row = plt.subplots(
        1, len(against), figsize=(5.5 * len(against), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    styles = [
        ("ppl", "validation", {"marker": "."}),
        ("average_ppl", "validation, averaged weights", {"linestyle": ":"}),
        ("train_ppl", "training", {"linestyle": "--", "linewidth": 1}),
    ]
    for axis, name in zip(row[0], against, strict=True):
        for place, (colour, label) in name_lines(found).items():
            axis.plot([], [], color=colour, label=label)
            for field, _, style in styles:
                axis.plot(*points(found[place], "valid", name, field), color=colour, **style)
        for _, label, style in styles:
            axis.plot([], [], color="grey", label=label, **style)
        axis.set_xlabel(AXES[name][0])
        axis.set_yscale("log")  # the first epochs would flatten the others
        axis.grid(True, which="both", linewidth=0.3)
        for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatter(plt.matplotlib.ticker.FormatStrFormatter("%g"))
    row[0][0].set_ylabel("perplexity")
    row[0][0].legend(fontsize=9)
    return figure


def draw_nth_farthest(plt: Any, found: Sequence[Run], against: Sequence[str]) -> Any:
    """Draw test accuracy (above) and training loss (below) against each of the given axes."""
    figure, axes = plt.subplots(
        2, len(against), figsize=(5.5 * len(against), 7), sharex="col", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, name in enumerate(against):
        above, below = axes[0][column], axes[1][column]
        for place, (colour, label) in name_lines(found).items():
            run = found[place]
            above.plot(*points(run, "train", name, "test_accuracy"), color=colour, label=label)
            below.plot(*points(run, "train", name, "loss"), color=colour)
        for value, text in reference_lines(found):
            above.axhline(value, color="grey", linestyle=":", linewidth=1)
            above.annotate(
                text, (1, value), xycoords=("axes fraction", "data"), xytext=(-3, -3),
                textcoords="offset points", fontsize=9, color="dimgrey", ha="right", va="top",
            )  # fmt: skip
        above.set_ylim(0, 1.02)
        below.set_xlabel(AXES[name][0])
    axes[0][0].set_ylabel("test accuracy")
    axes[1][0].set_ylabel("training loss (nats)")
    axes[0][0].legend(fontsize=10, loc="lower left")
    return figure


def reference_lines(found: Sequence[Run]) -> list[tuple[float, str]]:
    """Return accuracies to compare with, and their names."""
    lines = {}
    for K in sorted({int(run.arguments["num_vectors"]) for run in found}):
        lines[1 / K] = f"chance, 1/{K}"
        # For n = K - 1 the answer is m itself. In the other cases one of K - 1 labels is guessed.
        lines[1 / K + (K - 1) / K * 1 / (K - 1)] = f"chance + nearest, 2/{K}"
    if any((run.arguments["num_vectors"], run.arguments["num_dims"]) == (8, 16) for run in found):
        lines[PAPER_ACCURACY] = "the paper's RMC, 91 %"
    return sorted(lines.items())


def draw_runs(paths: Sequence[Path], path: Path, against: Sequence[str] | None = None) -> int:
    """Draw the curves of runs into a PNG and return the number of runs. Raise UserError if it cannot be done.

    Args:
        paths: as run_files.read_runs takes them; all language models or all Nth farthest.
        against: keys of AXES; None for epochs and wall time, or steps and wall time for Nth farthest.
    """
    plt = import_pyplot()
    found = run_files.read_runs(paths)
    nth_farthest = found[0].is_nth_farthest
    if any(run.is_nth_farthest != nth_farthest for run in found):
        raise UserError(
            "language models and Nth-farthest runs cannot share a plot. Give the runs of one kind, for "
            "example with runs/train_rmc-* in place of runs."
        )
    against = against or (("steps", "wall") if nth_farthest else ("epochs", "wall"))
    if nth_farthest and {"epochs", "tokens"} & set(against):
        raise UserError("Nth-farthest runs have no epochs or tokens. Use --against steps wall.")
    if "tokens" in against and any("corpus" not in run.record for run in found):
        raise UserError("a run's args.json does not hold the size of its corpus. Use --against epochs.")
    draw = draw_nth_farthest if nth_farthest else draw_language_models
    figure = draw(plt, found, against)
    try:
        files.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. Choose another --outf.") from None
    finally:
        plt.close(figure)
    return len(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="a path as above")
    parser.add_argument("--outf", type=Path, default=Path("runs.png"), metavar="PNG", help="file to write")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=list(AXES),
        help="horizontal axes, one panel for each (default: epochs wall; Nth farthest: steps wall)",
    )
    args = parser.parse_args(argv)
    count = draw_runs(args.paths, args.outf, args.against)
    console.say(f"curves of {count} run{'s' if count > 1 else ''}: {args.outf}")


if __name__ == "__main__":
    console.run_script(main)
