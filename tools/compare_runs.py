"""Compare language-model runs: a table in Markdown from their folders, and their perplexity curves as PNG.

Runs that differ in nothing but the seed (and in where they ran and how much they told) are one row, with the
mean of their perplexities and, from two runs on, the standard deviation over seeds (of a sample, n - 1). Each
seed counts once: of several runs with one seed the first that has been tested stands for it, the others are
named in the column of the seeds and left out of every number. The table goes to standard output.

A folder that is no run itself stands for the runs in it and in the folders in it, no deeper: those of
language models that have finished an epoch. What is left out is told on standard error.

Examples: python compare_runs.py runs
          python compare_runs.py results/tiny/rmc results/tiny/lstm --outf curves.png
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plot_runs

import train_rmc
import train_rnn
from training import console, devices, flags
from training.console import UserError

# Arguments that change nothing in a run's numbers but the seed's; a recipe is the flags that it sets.
NOT_COMPARED = flags.RESUME_MAY_CHANGE | {
    "seed", "name", "recipe", "evaluate", "state_lengths", "collective_timeout"
}  # fmt: skip
# Of flags that a run is older than: a new flag's default must leave things as they were.
DEFAULTS = {script.SCRIPT: vars(script.build_parser().parse_args([])) for script in (train_rmc, train_rnn)}
# Flags that the row's command leaves out, each with a value: the row stands for several seeds and folders.
LEFT_OUT = ("--seed", "--name", "--runs-folder", "--resume", "--save-every")
HEADER = ("run", "model", "parameters", "valid", "test", "epochs", "minutes", "seeds", "hardware", "command")


@dataclass
class Result:
    """A run as a table has it: perplexities (None: not yet), epochs done and the best one, minutes."""

    folder: Path
    run: plot_runs.Run
    record: dict[str, Any]
    valid: float | None
    test: float | None
    epochs: int
    best_epoch: int | None
    minutes: float

    @property
    def processes(self) -> int:
        """How many processes trained it; 1 in records from before there could be more."""
        return self.record.get("processes", 1)

    @property
    def gpus(self) -> list[str]:
        """The names of the GPUs that it saw; none of a run on the CPU."""
        return self.record.get("environment", {}).get("gpus") or [] if self.run.arguments.get("cuda") else []

    @property
    def replicas(self) -> int:
        """How many copies of the model share a batch: one per process, or one per GPU of a single process."""
        if self.processes > 1 or not self.gpus:
            return self.processes
        given = {**DEFAULTS[self.run.script], **self.run.arguments}
        return devices.replica_count(len(self.gpus), given["batch_size"] // given["accumulate"])

    @property
    def has_dropout(self) -> bool:
        """Whether any probability of dropping something is above 0."""
        given = {k: v for k, v in self.run.arguments.items() if k.startswith("dropout_")}
        places = {k: self.run.arguments.get("dropout") if v is None else v for k, v in given.items()}
        return any(places.values()) if places else bool(self.run.arguments.get("dropout"))


class NoPerplexity(UserError):
    """The run is not of a language model."""


def read_result(folder: Path) -> Result:
    """Reads a run folder.

    Raises:
        NoPerplexity: the run is not of a language model.
        UserError: the folder is no run folder.
    """
    run = plot_runs.read_run(folder)
    if run.script not in plot_runs.LANGUAGE_MODEL_SCRIPTS:
        raise NoPerplexity(f"a run of {run.script}.py, which has no perplexity")
    record = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    epochs, valid, best_epoch = 0, None, None
    for event in run.events:
        if event.get("event") == "valid":
            epochs = event["epoch"]
            scores = [event[key] for key in ("ppl", "average_ppl") if event.get(key) is not None]
            if scores and (valid is None or min(scores) < valid):
                valid, best_epoch = min(scores), epochs
    # An interrupted run tests its best model too, but that is not the result of its arguments.
    tests = [event["ppl"] for event in run.events if event.get("event") == "test"]
    seconds = max((event.get("seconds") or 0 for event in run.events), default=0)
    return Result(folder, run, record, valid, tests[-1] if tests else None, epochs, best_epoch, seconds / 60)


def find_results(folders: Sequence[Path]) -> list[Result]:
    """The language-model runs among the folders and, of those that are no run themselves, in them.

    Each run counts once. Runs of other scripts, and within a folder those without a finished epoch or that
    cannot be read, are left out, with a line on standard error.

    Raises:
        UserError: a folder that is named is not there or its run cannot be read, or no run is left.
    """
    results: dict[Path, Result] = {}
    for folder, named in plot_runs.run_folders(folders):
        try:
            result = read_result(folder)
        except NoPerplexity as error:
            plot_runs.say_left_out(folder, str(error))
        except UserError as error:
            if named:
                raise
            plot_runs.say_left_out(folder, str(error))
        else:
            if not named and result.valid is None:
                plot_runs.say_left_out(folder, "no epoch of it is finished")
            else:
                results.setdefault(folder.resolve(), result)
    if not results:
        raise UserError(
            "there is no language-model run to compare. Give run folders of train_rmc.py or train_rnn.py, or "
            "a folder with such runs."
        )
    plot_runs.tell_apart({folder: result.run for folder, result in results.items()})
    return list(results.values())


def group(results: Sequence[Result]) -> list[list[Result]]:
    """Runs with identical arguments but the seed, in the order in which the first of each was given.

    Runs of one seed come in one group, though they are not several: see `one_per_seed`.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        given = {**DEFAULTS[result.run.script], **result.run.arguments}
        compared = {k: v for k, v in given.items() if k not in NOT_COMPARED}
        if result.has_dropout:  # each replica and each piece of a batch draws masks of its own
            compared["accumulate"] = result.run.arguments.get("accumulate", 1)
            compared["replicas"] = result.replicas
        groups.setdefault(json.dumps([result.run.script, compared], sort_keys=True), []).append(result)
    return list(groups.values())


def one_per_seed(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """A group's runs of different seeds, and those whose seed another run stands for.

    Of several runs with one seed the first with a test perplexity stands for it, else the first.
    """
    by_seed: dict[Any, Result] = {}
    for result in results:
        seed = result.run.arguments.get("seed")
        if seed not in by_seed or (by_seed[seed].test is None and result.test is not None):
            by_seed[seed] = result
    chosen = list(by_seed.values())
    return chosen, [result for result in results if not any(result is other for other in chosen)]


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """'12.34', '12.34 ± 0.56' of several, or '-' while one of them is missing."""
    if not values or any(value is None or not math.isfinite(value) for value in values):
        return "-"
    text = f"{statistics.fmean(values):.2f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.2f}"


def row(results: Sequence[Result]) -> list[str]:
    """One group as the cells of HEADER."""
    results, repeated = one_per_seed(results)
    first = results[0]
    model = "RMC" if first.run.script == "train_rmc" else str(first.run.arguments.get("model", "RNN"))
    seeds = " ".join(str(result.run.arguments.get("seed", "?")) for result in results)
    if repeated:
        again = [
            f"{run.label} (seed {run.arguments.get('seed', '?')} again)"
            for run in (result.run for result in repeated)
        ]
        seeds += f"; left out: {', '.join(again)}"
    epochs = sorted({result.epochs for result in results})
    best = sorted({result.best_epoch for result in results if result.best_epoch is not None})
    parameters = first.record.get("parameters")
    return [
        ", ".join(result.run.label for result in results),
        model,
        f"{parameters:,}" if isinstance(parameters, int) else "-",
        # Of runs that are not equally far, a mean would say nothing.
        mean_and_deviation([result.valid for result in results]) if len(epochs) == 1 else "-",
        mean_and_deviation([result.test for result in results]),
        f"{span(epochs)} (best {span(best)})" if best else span(epochs),
        f"{statistics.fmean(result.minutes for result in results):.1f}" if len(epochs) == 1 else "-",
        seeds,
        "; ".join(dict.fromkeys(map(hardware, results))),
        f"`{command(first)}`",
    ]


def hardware(result: Result) -> str:
    """What the run was trained on, with which torch."""
    environment = result.record.get("environment", {})
    text = result.gpus[0] if result.gpus else f"CPU, {environment.get('threads', '?')} thread(s)"
    if result.processes > 1:
        text += f", {result.processes} processes"
    elif result.replicas > 1:
        text = f"{result.replicas} x {text}"
    return f"{text}, torch {environment.get('torch', '?')}"


def span(numbers: Sequence[int]) -> str:
    """'3', or '3 to 5'."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def command(result: Result) -> str:
    """The command of a run without what belongs to this one run, and with --epochs as it was last."""
    given = result.record.get("command_line", [])
    resumed = [word for again in result.record.get("resumed", []) for word in again["command_line"]]
    left_out = (*LEFT_OUT, "--epochs")
    kept, words = [], iter(given)
    for word in words:
        if word in left_out:
            next(words, None)
        elif not word.startswith(tuple(f"{flag}=" for flag in left_out)):
            kept.append(word)
    if any(word.partition("=")[0] == "--epochs" for word in (*given, *resumed)):
        kept += ["--epochs", str(result.run.arguments["epochs"])]
    words = shlex.join([f"{result.run.script}.py", *kept])
    return f"{result.record.get('launcher', 'python')} {words}".replace("|", "\\|")


def markdown(results: Sequence[Result]) -> str:
    """The table."""
    rows = [HEADER, ["---"] * len(HEADER), *(row(members) for members in group(results))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


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
    parser.add_argument("--outf", type=Path, default=None, metavar="PNG", help="also draw the curves")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, draws the curves if asked; returns the exit status."""
    args = build_parser().parse_args(argv)
    results = find_results(args.folders)
    print(markdown(results))
    if args.outf is not None:
        plot_runs.draw_runs([result.folder for result in results], args.outf)
    return 0


if __name__ == "__main__":
    console.run_script(main)
