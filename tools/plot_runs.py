"""Draw the curves of any number of runs into one PNG, from their logs: also while they are still running.

Language-model runs are drawn as perplexity against epochs and against minutes; runs of train_nth_farthest.py
as accuracy and loss against steps and against minutes, with lines for chance, for the plateau of a model that
knows only that the nearest vector is the reference itself, and for the paper's 91 %.

A folder that is no run itself stands for the runs in it and in the folders in it, no deeper; what cannot be
drawn of these is left out, and told on standard error.

Examples: python plot_runs.py runs
          python plot_runs.py results/nth_farthest/small --outf accuracy.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import console, files, flags, runs
from training.console import UserError

NTH_FARTHEST_SCRIPT = "train_nth_farthest"
LANGUAGE_MODEL_SCRIPTS = ("train_rmc", "train_rnn")
PAPER_ACCURACY = 0.91  # "consistently", 8 vectors of 16 dimensions: arXiv:1806.01822, section 5.1
MINUTE = 60


def import_pyplot() -> Any:
    """matplotlib.pyplot, set to draw into files.

    Raises:
        UserError: matplotlib is missing or broken.
    """
    # A machine without a screen, or without a writable home, is the normal case for a training machine.
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError(
            f"plots need matplotlib, which cannot be imported ({error}). "
            "Install it with: pip install -r requirements-extra.txt"
        ) from None
    return plt


@dataclass
class Run:
    """What a run's folder says about it."""

    label: str
    script: str
    arguments: dict[str, Any]
    events: list[dict[str, Any]]

    def series(self, event: str, x: str, y: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
        """Two fields of the events of a kind, the first times `scale`; events that lack one are left out."""
        points = [
            (entry[x] * scale, entry[y])
            for entry in self.events
            if entry.get("event") == event and _is_number(entry.get(x)) and _is_number(entry.get(y))
        ]
        return [point[0] for point in points], [point[1] for point in points]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(folder: Path) -> Run:
    """Reads args.json and log.jsonl of a run folder.

    Raises:
        UserError: the folder is no run folder, or the run is of a kind that has no curves.
    """
    if not folder.is_dir():
        raise UserError(f"no run folder {folder}: it is {'a file' if folder.exists() else 'not there'}.")
    for name in ("args.json", "log.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a run folder with a log: it has no {name}.")
    try:
        record = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        script, arguments = str(record["script"]), dict(record["arguments"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'args.json'} cannot be read ({type(error).__name__}: {error}).") from None
    if script != NTH_FARTHEST_SCRIPT and script not in LANGUAGE_MODEL_SCRIPTS:
        raise UserError(
            f"{folder} is a run of {script!r}, for which there is no plot. "
            f"Known: {', '.join((*LANGUAGE_MODEL_SCRIPTS, NTH_FARTHEST_SCRIPT))}."
        )
    return Run(folder.resolve().name, script, arguments, runs.read_log(folder / "log.jsonl"))


def run_folders(folders: Sequence[Path]) -> list[tuple[Path, bool]]:
    """Run folders: those given (True) and, of folders that are no runs themselves, those inside (False).

    A folder with nothing in it is told on standard error. Whether the runs can be read is not looked at.
    """
    found: list[tuple[Path, bool]] = []
    for folder in folders:
        if is_run(folder) or not folder.is_dir():
            found.append((folder, True))
        elif inside := runs_inside(folder):
            found += [(run, False) for run in inside]
        else:
            say_left_out(folder, "neither a run folder nor a folder with runs in it")
    return found


def is_run(folder: Path) -> bool:
    """Whether a folder has one of the two files that tell of a run."""
    return any((folder / name).is_file() for name in ("args.json", "log.jsonl"))


def runs_inside(folder: Path) -> list[Path]:
    """The run folders in a folder, by name, and in those of its folders that are no runs."""
    found = []
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        if is_run(child):
            found.append(child)
        else:
            found += sorted(path for path in child.iterdir() if path.is_dir() and is_run(path))
    return found


def say_left_out(folder: Path, reason: str) -> None:
    """One line for a run that is not in the table or the picture."""
    print(f"left out: {folder}: {reason.rstrip('.')}", file=sys.stderr)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of the folders, each once; of runs found in a folder, those that can be drawn.

    Raises:
        UserError: a folder that was named itself is no run, or no run is left.
    """
    found: dict[Path, Run] = {}
    for folder, named in run_folders(folders):
        try:
            run = read_run(folder)
            if not named:
                require_events([run], "train" if run.script == NTH_FARTHEST_SCRIPT else "valid")
        except UserError as error:
            if named:
                raise
            say_left_out(folder, str(error))
        else:
            found.setdefault(folder.resolve(), run)
    if not found:
        raise UserError("there is no run to draw. Give run folders, or a folder with runs that have begun.")
    tell_apart(found)
    return list(found.values())


def tell_apart(found: Mapping[Path, Run]) -> None:
    """Gives runs whose folders have one name that of the folder above, too, which may still not differ."""
    names = Counter(run.label for run in found.values())
    for folder, run in found.items():
        if names[run.label] > 1:
            run.label = f"{folder.parent.name}/{run.label}"


def draw_runs(folders: Sequence[Path], path: Path) -> int:
    """Draws the runs' curves into a PNG; returns how many runs these are.

    Args:
        folders: run folders or folders that hold such, all of language models or all of Nth farthest.
        path: the PNG to write.

    Raises:
        UserError: no matplotlib, a folder that cannot be drawn, both kinds at once, or nothing logged yet.
    """
    plt = import_pyplot()
    found = read_runs(folders)
    kinds = {run.script == NTH_FARTHEST_SCRIPT for run in found}
    if len(kinds) > 1:
        names = ", ".join(f"{run.label} ({run.script})" for run in found)
        raise UserError(
            f"these runs have no axis in common: {names}. Plot language models and Nth farthest separately."
        )
    draw = draw_nth_farthest if kinds == {True} else draw_language_models
    figure = draw(plt, found)
    save(figure, plt, path)
    return len(found)


def save(figure: Any, plt: Any, path: Path) -> None:
    """Writes the figure as PNG, whole or not at all, and forgets it."""
    try:
        files.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from None
    finally:
        plt.close(figure)


def draw_nth_farthest(plt: Any, found: Sequence[Run]) -> Any:
    """Test accuracy (above) and training loss (below), against steps (left) and minutes (right)."""
    require_events(found, "train")
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex="col", sharey="row", layout="constrained")
    for number, run in enumerate(found):
        for column, (x, scale) in enumerate((("step", 1.0), ("seconds", 1 / MINUTE))):
            axes[0][column].plot(
                *run.series("train", x, "test_accuracy", scale), color=f"C{number}", label=run.label
            )
            axes[1][column].plot(*run.series("train", x, "loss", scale), color=f"C{number}")
    for axis in axes[0]:
        for value, name in reference_lines(found):
            axis.axhline(value, color="grey", linestyle=":", linewidth=1)
            axis.annotate(
                name,
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-3, 2),
                textcoords="offset points",
                fontsize=8,
                color="grey",
                ha="right",
            )
        axis.set_ylim(0, 1.02)
    axes[0][0].set_ylabel("test accuracy")
    axes[1][0].set_ylabel("training loss (nats)")
    axes[1][0].set_xlabel("steps")
    axes[1][1].set_xlabel("minutes")
    axes[0][0].legend(fontsize=8, loc="upper left")
    return figure


def reference_lines(found: Sequence[Run]) -> list[tuple[float, str]]:
    """Accuracies worth a line, with names: chance, plateau and, where the task is the paper's, its result."""
    lines = {}
    for K in sorted({int(run.arguments["num_vectors"]) for run in found}):
        lines[1 / K] = f"chance 1/{K}"
        # n = K - 1 asks for m itself: right in 1/K of the cases, and in the others a guess among K - 1
        # labels.
        lines[1 / K + (K - 1) / K * 1 / (K - 1)] = f"plateau 2/{K}"
    if any((run.arguments["num_vectors"], run.arguments["num_dims"]) == (8, 16) for run in found):
        lines[PAPER_ACCURACY] = "the paper's RMC, 91 %"
    return sorted(lines.items())


def draw_language_models(plt: Any, found: Sequence[Run]) -> Any:
    """Validation (solid; averaged weights dotted) and training (dashed) perplexity.

    Against epochs (left) and minutes (right).
    """
    require_events(found, "valid")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for number, run in enumerate(found):
        for axis, (x, scale) in zip(axes, (("epoch", 1.0), ("seconds", 1 / MINUTE)), strict=True):
            axis.plot(
                *run.series("valid", x, "ppl", scale),
                color=f"C{number}",
                marker=".",
                label=f"{run.label}: valid",
            )
            averaged = run.series("valid", x, "average_ppl", scale)
            if averaged[0]:
                axis.plot(*averaged, color=f"C{number}", linestyle=":", label=f"{run.label}: averaged")
            axis.plot(
                *run.series("valid", x, "train_ppl", scale),
                color=f"C{number}",
                linestyle="--",
                linewidth=1,
                label=f"{run.label}: train",
            )
    for axis, name in zip(axes, ("epochs", "minutes"), strict=True):
        axis.set_xlabel(name)
        axis.set_yscale("log")  # the first epochs must not hide the last
        axis.grid(True, which="both", linewidth=0.3)
        axis.yaxis.set_major_formatter(plt.matplotlib.ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(plt.matplotlib.ticker.FormatStrFormatter("%g"))
    axes[0].set_ylabel("perplexity")
    axes[0].legend(fontsize=8)
    return figure


def require_events(found: Sequence[Run], event: str) -> None:
    """Raises UserError unless at least one run has something to draw."""
    if not any(entry.get("event") == event for run in found for entry in run.events):
        raise UserError(
            f"nothing to plot yet: no {event!r} event in the log of {', '.join(run.label for run in found)}."
        )


def draw_attention(weights: Any, path: Path) -> None:
    """Draws the attention of one sequence: a row of pictures per head, a column per time step.

    Args:
        weights: (T, heads, R, R) array; query rows, then key rows, the input row being the
            last.
        path: the PNG to write.

    Raises:
        UserError: no matplotlib, or the file cannot be written.
    """
    plt = import_pyplot()
    steps, heads, rows, _ = weights.shape
    figure, axes = plt.subplots(
        heads, steps, figsize=(1 + 0.9 * steps, 0.9 + 0.9 * heads), squeeze=False, layout="constrained"
    )
    for head in range(heads):
        for step in range(steps):
            axis = axes[head][step]
            # The input row's own query is left out: its result is dropped when there is one block.
            image = axis.imshow(weights[step, head, : rows - 1], vmin=0, vmax=1, cmap="magma", aspect="auto")
            axis.set_xticks([])
            axis.set_yticks([])
            if head == 0:
                axis.set_title(f"step {step + 1}", fontsize=8)
            if step == 0:
                axis.set_ylabel(f"head {head + 1}", fontsize=8)
    figure.supxlabel(f"key row: slots 1 to {rows - 1}, then the input (last column)", fontsize=8)
    figure.supylabel(f"query row: slots 1 to {rows - 1}", fontsize=8)
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    save(figure, plt, path)


def build_parser() -> argparse.ArgumentParser:
    """All flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="RUN_FOLDER",
        help="folders with args.json and log.jsonl, or folders that hold such, as runs/ and results/ do",
    )
    parser.add_argument(
        "--outf", type=Path, default=Path("runs.png"), metavar="PNG", help="the picture to write"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Draws what the command line asks for; returns the exit status."""
    args = build_parser().parse_args(argv)
    count = draw_runs(args.folders, args.outf)
    print(f"curves of {count} run{'s' if count > 1 else ''}: {args.outf}")
    return 0


if __name__ == "__main__":
    console.run_script(main)
