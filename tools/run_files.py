"""Read training runs for the other tools.

A run is a run folder (args.json and log.jsonl), or a line of a study file, which tools/pack_runs.py writes:

    {"name": ..., "args": <content of args.json>, "log": [<events of log.jsonl>]}

A folder means all run folders and study files in it. STUDY/NAME, without .jsonl, means one run of a study
file; NAME may be a pattern such as 'rmc-*'.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _project  # noqa: F401
from training import runs
from training.console import UserError

LANGUAGE_MODELS = ("train_rmc", "train_rnn")  # scored by perplexity; the other scripts by accuracy
# Arguments that do not change what a run computes, apart from the seed.
NOT_SETTINGS = (
    "seed", "name", "recipe", "resume", "evaluate", "state_lengths", "cuda", "threads", "save_every",
    "runs_folder", "no_cuda_graph", "collective_timeout", "stop_after",
    "average_trigger",  # of a former kind of --average
)  # fmt: skip
# Flags that are younger than some runs, with the value that these had.
YOUNGER = {"init_scale": 1.0}


@dataclass
class Run:
    """One run: the content of its args.json and the events of its log.

    path: the run folder, or STUDY/NAME for a run of the study file STUDY.jsonl.
    """

    name: str
    path: Path
    record: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def script(self) -> str:
        return self.record["script"]

    @property
    def arguments(self) -> dict[str, Any]:
        return self.record["arguments"]

    @property
    def kind(self) -> str:
        """Equal for runs that can share a table and a plot: 'language model', or the script's task."""
        return "language model" if self.script in LANGUAGE_MODELS else self.script.removeprefix("train_")

    @property
    def model(self) -> str:
        """'RMC', 'LSTM' and so on."""
        return "RMC" if self.script == "train_rmc" else str(self.arguments.get("model", "?")).upper()

    @property
    def gpus(self) -> list[str]:
        """Names of the GPUs that the run could use, empty for a run on the CPU."""
        return self.record.get("environment", {}).get("gpus") or [] if self.arguments.get("cuda") else []

    def find(self, event: str, field: str) -> list[Any]:
        """Return a field of all events of a kind, without missing and non-finite (null) values."""
        return [e[field] for e in self.events if e.get("event") == event and e.get(field) is not None]

    def settings(self) -> str:
        """Return a key that is equal for runs which differ in nothing but the seed.

        A flag that is off counts as absent: older runs lack the newer flags.
        """
        given = {name: value for name, value in (YOUNGER | self.arguments).items() if value}
        settings = {name: value for name, value in given.items() if name not in NOT_SETTINGS}
        # Each process, GPU and micro-batch draws its own dropout masks.
        copies = (self.record.get("processes", 1), len(self.gpus))
        return json.dumps([self.script, settings, copies], sort_keys=True)


def group(found: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ only in their seed, in the order in which the first of each was given."""
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(run.settings(), []).append(run)
    return list(groups.values())


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read all runs of the given paths, each once, with names that differ.

    A run without results is skipped with one line on standard error.

    Args:
        paths: run folders, folders with runs, study files and STUDY/NAME.

    Raises:
        UserError: a path does not exist, a file is damaged, or no run has results.
    """
    found: dict[Path, Run] = {}
    for run in (run for path in paths for run in read_path(path)):
        words = run.kind == "language model"
        if run.find(*(("valid", "epoch") if words else ("train", "test_accuracy"))):
            found.setdefault(run.path.resolve(), run)
        else:
            print(f"skipped {run.path}: its log has no finished epoch and no test accuracy", file=sys.stderr)
    if not found:
        raise UserError("no run with results found. Give run folders, folders with runs or study files.")
    names = Counter(run.name for run in found.values())
    for path, run in found.items():
        if names[run.name] > 1:
            run.name = f"{path.parent.name}/{run.name}"
    return list(found.values())


def read_path(path: Path) -> Iterator[Run]:
    """Yield the runs of a run folder, a folder with runs, a study file or STUDY/NAME.

    Raises:
        UserError: the path does not exist, or a file in it is damaged.
    """
    study = path.parent.parent / f"{path.parent.name}.jsonl"
    if path.is_file():
        yield from read_study(path)
    elif path.is_dir():
        for file in sorted(path.rglob("*.jsonl")):
            if file.name == "log.jsonl":
                yield read_run_folder(file.parent)
            elif is_study(file):
                yield from read_study(file)
    elif study.is_file():
        yield from (run for run in read_study(study) if fnmatch.fnmatchcase(run.name, path.name))
    else:
        raise UserError(f"{path} does not exist. Give a run folder, a folder with runs or a study file.")


def is_study(path: Path) -> bool:
    """Return whether the first line of a .jsonl file is a run."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline(200).find('"args": {') > 0


def read_run_folder(folder: Path) -> Run:
    """Read a run folder; UserError if its args.json is missing or damaged."""
    try:
        record = runs.read_json(folder / "args.json")
        return make_run(folder.resolve().name, folder, record, runs.log_events(folder / "log.jsonl"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'args.json'} cannot be read ({type(error).__name__}: {error}).") from None


def read_study(path: Path) -> list[Run]:
    """Read all runs of a study file; UserError if it is not a study file."""
    found = []
    with open(path, encoding="utf-8") as lines:
        try:
            for line in lines:
                entry = json.loads(line)
                place = path.with_suffix("") / entry["name"]
                found.append(make_run(entry["name"], place, entry["args"], entry["log"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a study file: line {len(found) + 1} is not a run "
                f"({type(error).__name__}: {error}). Make study files with tools/pack_runs.py."
            ) from None
    return found


def make_run(name: str, path: Path, record: dict[str, Any], events: Iterable[dict[str, Any]]) -> Run:
    """Build a Run; KeyError or TypeError if args.json lacks the script or its arguments."""
    record = {**record, "script": str(record["script"]), "arguments": dict(record["arguments"])}
    return Run(name, path, record, runs.drop_repeated(events))
