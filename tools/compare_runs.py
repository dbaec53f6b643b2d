"""Compare runs in a Markdown table, written to standard output.

Runs that differ only in their seed share a row with the mean over them and, from two runs on, the standard
deviation (of a sample, n - 1). Language models, and the runs of each other script, get a table of their own.
The last column is the command line that started the row's first run, followed by those that resumed it.

Paths are run folders, folders with runs, study files (STUDY.jsonl, made by tools/pack_runs.py), or STUDY/NAME
for one run of a study file.

Examples: python tools/compare_runs.py runs
          python tools/compare_runs.py results/tiny/rmc results/tiny/others.jsonl
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import _project  # noqa: F401
from training import console, flags

import run_files
from run_files import Run

# ---- one run in numbers


def percent(run: Run, field: str) -> float | None:
    """Return a share from the final event in percent; None if not tested."""
    return 100 * run.find("final", field)[-1] if run.find("final", field) else None


def score(run: Run) -> float | None:
    """Return the test perplexity of a language model, or the accuracy in percent; None if not tested."""
    if run.kind == "language model":
        return run.find("test", "ppl")[-1] if run.find("test", "ppl") else None
    return percent(run, "accuracy")


def valid(run: Run) -> float:
    """Return the best validation perplexity of the weights or their average."""
    return min(run.find("valid", "ppl") + run.find("valid", "average_ppl"), default=math.nan)


def epochs(run: Run) -> str:
    """Return the finished epochs and the best one, as '7 (best 7)'."""
    done = [event for event in run.events if event.get("event") == "valid"]
    best = [event["epoch"] for event in done if valid(run) in (event.get("ppl"), event.get("average_ppl"))]
    return f"{done[-1]['epoch']} (best {best[0]})" if best else "-"


def minutes(run: Run) -> float:
    """Return the wall time of training."""
    return max((e.get("seconds") or 0 for e in run.events), default=0) / 60


def steps_to(run: Run, level: float | None = None) -> str:
    """Return the first step with this test accuracy, '-' if there is none.

    Args:
        level: None for leaving the plateau of Nth farthest: six standard deviations above 2/K.
    """
    if level is None:
        plateau = 2 / run.arguments["num_vectors"]
        level = plateau + 6 * math.sqrt(plateau * (1 - plateau) / run.arguments["test_examples"])
    reached = [e["step"] for e in run.events if (e.get("test_accuracy") or 0) >= level]
    return f"{reached[0]:,}" if reached else "-"


def hardware(run: Run) -> str:
    """Return what the run was trained on, and the version of torch."""
    environment = run.record.get("environment", {})
    gpus, processes = run.gpus, run.record.get("processes", 1)
    text = (
        gpus[0] if gpus else f"{environment.get('cpu', 'CPU')}, {environment.get('threads', '?')} thread(s)"
    )
    if processes > 1:
        text += f", {processes} processes"
    elif len(gpus) > 1:
        text = f"{len(gpus)} x {text}"
    return f"{text}, torch {environment.get('torch', '?')}"


def command(run: Run) -> str:
    """Return the command lines that started and resumed the run, exactly as they were given."""
    calls = [run.record, *run.record.get("resumed", [])]
    lines = [
        shlex.join(
            [*call.get("launcher", "python").split(), f"{run.script}.py", *call.get("command_line", [])]
        )
        for call in calls
    ]
    return ", then ".join(map(code, lines))


# ---- tables


def code(text: str) -> str:
    """Return text as code in a cell of a Markdown table."""
    return f"`{text}`".replace("|", "\\|").replace("\n", " ")


def mean(values: Sequence[float | None], digits: int = 2) -> str:
    """Return '12.34', '12.34 ± 0.56' for several values, or '-' if one is missing or not finite."""
    if any(value is None or not math.isfinite(value) for value in values):
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def each(values: Sequence[str]) -> str:
    """Return 'a / b / c', or 'a' if all values are equal."""
    return values[0] if len(set(values)) == 1 else " / ".join(values)


LANGUAGE_COLUMNS: dict[str, Callable[[Sequence[Run]], str]] = {
    "valid": lambda members: mean([valid(run) for run in members]),
    "test": lambda members: mean([score(run) for run in members]),
    "epochs": lambda members: each([epochs(run) for run in members]),
}
ACCURACY_COLUMNS: dict[str, Callable[[Sequence[Run]], str]] = {
    "accuracy %": lambda members: mean([score(run) for run in members], 1),
    "steps to 90 %": lambda members: " / ".join(steps_to(run, 0.9) for run in members),
    "steps": lambda members: each([f"{run.find('train', 'step')[-1]:,}" for run in members]),
}
COLUMNS = {
    "language model": LANGUAGE_COLUMNS,
    "nth_farthest": ACCURACY_COLUMNS
    | {"steps to leave the plateau": lambda members: " / ".join(steps_to(run) for run in members)},
    "learning_to_execute": ACCURACY_COLUMNS
    | {
        "whole answers %": lambda members: mean([percent(run, "answers") for run in members], 1),
        "constant answer %": lambda members: mean([percent(members[0], "chance")], 1),
    },
}


def row(members: Sequence[Run], columns: dict[str, Callable[[Sequence[Run]], str]]) -> dict[str, str]:
    """Return the cells of a group of runs by column."""
    first, seeds = members[0], [str(run.arguments.get("seed", "?")) for run in members]
    parameters = first.record.get("parameters")
    return {
        "run": ", ".join(code(run.name) for run in members),
        "model": first.model,
        "parameters": f"{parameters:,}" if isinstance(parameters, int) else "-",
        **{name: cell(members) for name, cell in columns.items()},
        "minutes": mean([minutes(run) for run in members], 1),
        "seeds": " ".join(seeds),
        "hardware": "; ".join(dict.fromkeys(map(hardware, members))),
        "command": command(first) + (f" (seed {seeds[0]})" if members[1:] else ""),
    }


def markdown(found: Sequence[Run], columns: dict[str, Callable[[Sequence[Run]], str]]) -> str:
    """Return the table of the given runs."""
    rows = [row(members, columns) for members in run_files.group(found)]
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(cells.values()) for cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="a path as above")
    found = run_files.read_runs(parser.parse_args(argv).paths)
    for kind in dict.fromkeys(run.kind for run in found):
        chosen = [run for run in found if run.kind == kind]
        console.say(markdown(chosen, COLUMNS.get(kind, ACCURACY_COLUMNS)) + "\n")


if __name__ == "__main__":
    console.run_script(main)
