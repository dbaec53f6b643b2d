"""Read training runs for the other tools.

A run is given as its run folder (args.json and log.jsonl), as a folder that contains run folders or study
files, directly or one level below, or as a study file. A study file NAME.jsonl contains one run per line:

    {"name": ..., "args": <content of args.json>, "log": [<events of log.jsonl>]}

STUDY/NAME, without .jsonl, means one run of a study file; NAME may be a pattern such as 'rmc-*'.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _project
from training import runs
from training.console import UserError

LANGUAGE_MODELS = ("train_rmc", "train_rnn")  # scored by perplexity; the other scripts by accuracy
# Arguments that do not change what a run computes, apart from the seed.
NOT_SETTINGS = (
    "seed", "name", "recipe", "resume", "evaluate", "state_lengths", "cuda", "threads", "log_interval",
    "save_every", "runs_folder", "no_cuda_graph", "collective_timeout", "stop_after",
    "average_trigger",  # of a former kind of --average
)  # fmt: skip


@functools.cache
def defaults(script: str) -> dict[str, Any]:
    """Return the default arguments of a training script."""
    return importlib.import_module(script).build_parser().defaults()


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

        A flag that is not in the run's arguments had its default. A former flag counts if it was on.
        """
        known = defaults(self.script)
        changed = {
            name: value
            for name, value in self.arguments.items()
            if name not in NOT_SETTINGS and (value != known[name] if name in known else value)
        }
        # Each process, GPU and micro-batch draws its own dropout masks.
        copies = (self.record.get("processes", 1), len(self.gpus))
        return json.dumps([self.script, changed, copies], sort_keys=True)


def group(found: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ only in their seed, in the order in which the first of each was given."""
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(run.settings(), []).append(run)
    return list(groups.values())


def why_unusable(run: Run) -> str | None:
    """Return why a run can be neither compared nor drawn, or None."""
    if not (run.script.startswith("train_") and (_project.FOLDER / f"{run.script}.py").is_file()):
        return f"a run of {run.script}.py, which is not a training script of this project"
    words = run.kind == "language model"
    if not run.find(*(("valid", "epoch") if words else ("train", "test_accuracy"))):
        return "its log has no results yet"
    return None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read all runs of the given paths, each once, with names that differ.

    An unusable run in a folder or study file is skipped with one line on standard error.

    Args:
        paths: run folders, folders with runs, study files and STUDY/NAME.

    Raises:
        UserError: a path does not exist, a run folder given by name cannot be used, or no run is left.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        named = is_run_folder(path) or not path.exists()
        for source in inside(path) if path.is_dir() and not named else [path]:
            try:
                for run in read_path(source):
                    reason = why_unusable(run)
                    if reason and named:
                        raise UserError(f"{run.path}: {reason}.")
                    if reason:
                        skip(run.path, reason)
                    else:
                        found.setdefault(run.path.resolve(), run)
            except UserError as error:
                if named or path.is_file():
                    raise
                skip(source, str(error))
    if not found:
        raise UserError("no usable run found. Give run folders, a folder with runs or a study file (.jsonl).")
    names = Counter(run.name for run in found.values())
    for path, run in found.items():
        if names[run.name] > 1:
            run.name = f"{path.parent.name}/{run.name}"
    return list(found.values())


def read_path(path: Path) -> list[Run]:
    """Read a run folder, a study file or STUDY/NAME.

    Raises:
        UserError: as read_run_folder and read_study.
    """
    study = path.parent.parent / f"{path.parent.name}.jsonl"
    if path.is_file():
        return read_study(path)
    if path.exists() or not study.is_file():
        return [read_run_folder(path)]
    named = [run for run in read_study(study) if run.name == path.name]
    return named or [run for run in read_study(study) if fnmatch.fnmatchcase(run.name, path.name)]


def skip(path: Path, reason: str) -> None:
    """Report a run that is left out, on standard error."""
    print(f"skipped {path}: {reason.rstrip('.')}", file=sys.stderr)


def is_run_folder(path: Path) -> bool:
    """Return whether a folder has one of a run's two files."""
    return (path / "args.json").is_file() or (path / "log.jsonl").is_file()


def inside(folder: Path) -> Iterator[Path]:
    """Yield the run folders and study files in a folder and in its subfolders, one level deep."""
    for child in sorted(folder.iterdir()):
        for path in [child] if is_run_folder(child) or not child.is_dir() else sorted(child.iterdir()):
            if is_run_folder(path) or (path.suffix == ".jsonl" and is_study(path)):
                yield path


def is_study(path: Path) -> bool:
    """Return whether the first line of a .jsonl file is a run."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline(200).find('"args": {') > 0


def read_run_folder(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: the folder does not exist, or args.json or log.jsonl is missing or damaged.
    """
    if not folder.exists():
        raise UserError(f"{folder} does not exist. Give a run folder, a folder with runs or a study file.")
    for name in ("args.json", "log.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a run folder with a log: it has no {name}.")
    try:
        record = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        return make_run(folder.resolve().name, folder, record, runs.log_events(folder / "log.jsonl"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'args.json'} cannot be read ({type(error).__name__}: {error}).") from None


def read_study(path: Path) -> list[Run]:
    """Read all runs of a study file.

    Raises:
        UserError: the file is not a study file.
    """
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
